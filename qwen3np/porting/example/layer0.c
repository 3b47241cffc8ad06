/* Layer 0 of a Qwen3 checkpoint in C99: a port that has come so far, and writes every point for `qwen3np compare`.

       qwen3np fixture -o golden                    the kit: a checkpoint, its ids, its golden values
       cc -std=c99 -O2 -o layer0 layer0.c -lm
       mkdir mine && ./layer0 golden/tied mine      writes mine/model.embed_tokens.npy and so on
       qwen3np compare golden/tied/values/golden.safetensors mine --model golden/tied

   -DBUG plants a bug: the rotation pairs neighbouring lanes, as other models do. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void fail(const char *what, const char *where) {
    fprintf(stderr, "error: %s: %s\n", where, what);
    exit(2);
}

static void *allocate(size_t bytes) {
    void *memory = malloc(bytes);
    if (!memory) fail("out of memory", "layer0");
    return memory;
}

/* ---- files: JSON is searched, not parsed, which is enough for a kit ---- */

static char *read_file(const char *folder, const char *name) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "rb");
    if (!file) fail("cannot be opened", path);
    fseek(file, 0, SEEK_END);
    long size = ftell(file);
    rewind(file);
    char *data = allocate((size_t)size + 1);
    if (fread(data, 1, (size_t)size, file) != (size_t)size) fail("cannot be read", path);
    data[size] = 0;
    fclose(file);
    return data;
}

static const char *after(const char *text, const char *key, const char *opening) {
    char quoted[256];
    snprintf(quoted, sizeof quoted, "\"%s\":", key);
    const char *at = strstr(text, quoted);
    if (!at || !(at = strstr(at + strlen(quoted), opening))) fail("not in the file", key);
    return at + strlen(opening);
}

/* A tensor of model.safetensors, of bfloat16: the upper half of a float each. */
static float *tensor(const char *file, const char *name, size_t size) {
    uint64_t header = 0;
    for (int i = 0; i < 8; i++) header |= (uint64_t)(unsigned char)file[i] << 8 * i;
    char *next;
    const char *offsets = after(after(file + 8, name, "{"), "data_offsets", "[");
    unsigned long begin = strtoul(offsets, &next, 10), end = strtoul(next + 1, NULL, 10);
    if (end - begin != 2 * size) fail("not a bfloat16 tensor of the expected size", name);
    const unsigned char *bytes = (const unsigned char *)file + 8 + header + begin;
    float *x = allocate(size * sizeof *x);
    for (size_t i = 0; i < size; i++) {
        uint32_t bits = (uint32_t)bytes[2 * i] << 16 | (uint32_t)bytes[2 * i + 1] << 24;
        memcpy(&x[i], &bits, sizeof bits);
    }
    return x;
}

/* A point of shape (1, a, b), or (1, a, b, c), as .npy: 128 bytes that say what it is, then the floats. */
static void dump(const char *folder, const char *name, const float *x, int a, int b, int c) {
    char path[4096], shape[64], header[128];
    snprintf(path, sizeof path, "%s/%s.npy", folder, name);
    snprintf(shape, sizeof shape, c ? "(1, %d, %d, %d)" : "(1, %d, %d)", a, b, c);
    snprintf(header, sizeof header, "{'descr': '<f4', 'fortran_order': False, 'shape': %s}", shape);
    size_t size = (size_t)a * b * (c ? c : 1);
    FILE *file = fopen(path, "wb");
    if (!file) fail("cannot be written", path);
    fwrite("\x93NUMPY\x01\x00\x76\x00", 1, 10, file); /* version 1.0, 0x76 = 118 bytes follow */
    fprintf(file, "%-117s\n", header);
    if (fwrite(x, sizeof *x, size, file) != size || fclose(file)) fail("cannot be written", path);
}

/* ---- the steps ---- */

/* y = x wT: x (rows, in), w (out, in) -> y (rows, out) */
static void linear(float *y, const float *x, const float *w, int rows, int in, int out) {
    for (int s = 0; s < rows; s++)
        for (int o = 0; o < out; o++) {
            float sum = 0;
            for (int i = 0; i < in; i++) sum += x[s * in + i] * w[o * in + i];
            y[s * out + o] = sum;
        }
}

/* x (rows, n) -> y (rows, n) */
static void rms_norm(float *y, const float *x, const float *w, int rows, int n, float eps) {
    for (int s = 0; s < rows; s++, x += n, y += n) {
        float sum = 0;
        for (int i = 0; i < n; i++) sum += x[i] * x[i];
        float scale = 1 / sqrtf(sum / n + eps);
        for (int i = 0; i < n; i++) y[i] = w[i] * (x[i] * scale);
    }
}

/* x (rows, heads, dh) -> y (heads, rows, dh) */
static void rotate(float *y, const float *x, int rows, int heads, int dh, double theta) {
    for (int h = 0; h < heads; h++)
        for (int s = 0; s < rows; s++)
            for (int i = 0; i < dh / 2; i++) {
                float power = (float)pow(theta, (float)(2 * i) / dh); /* rounded at each step, as in training */
                float angle = s * (1 / power), c = cosf(angle), d = sinf(angle);
#ifdef BUG
                int one = 2 * i, other = 2 * i + 1;
#else
                int one = i, other = i + dh / 2;
#endif
                const float *from = x + (s * heads + h) * dh;
                float *to = y + (h * rows + s) * dh;
                to[one] = from[one] * c - from[other] * d;
                to[other] = from[other] * c + from[one] * d;
            }
}

static void softmax(float *y, const float *x, int n) {
    float largest = x[0], sum = 0;
    for (int i = 1; i < n; i++) largest = fmaxf(largest, x[i]);
    for (int i = 0; i < n; i++) sum += y[i] = expf(x[i] - largest);
    for (int i = 0; i < n; i++) y[i] /= sum;
}

int main(int count, char **argument) {
    if (count != 3) fail("usage: layer0 KIT OUT, a folder of the kit and a folder for the points", argument[0]);
    const char *out = argument[2];
    const char *config = read_file(argument[1], "config.json"), *file = read_file(argument[1], "model.safetensors");
#define SIZE(key) ((int)strtod(after(config, key, ""), NULL))
    int D = SIZE("hidden_size"), F = SIZE("intermediate_size"), V = SIZE("vocab_size");
    int H = SIZE("num_attention_heads"), K = SIZE("num_key_value_heads"), Dh = SIZE("head_dim");
    float eps = strtof(after(config, "rms_norm_eps", ""), NULL);
    double theta = strtod(after(config, "rope_theta", ""), NULL);

    char *next = (char *)after(read_file(argument[1], "values/ids.json"), "prompt", "[");
    int S = 0, *ids = allocate(strlen(next) * sizeof *ids);
    for (next--; *next != ']';) ids[S++] = (int)strtol(next + 1, &next, 10);

#define WEIGHT(name, size) tensor(file, "model.layers.0." name ".weight", size)
#define POINT(name, ...) dump(out, "model.layers.0" name, __VA_ARGS__)
#define FLOATS(size) allocate(sizeof(float) * (size_t)(size))
    float *x = FLOATS(S * D), *h = FLOATS(S * D), *y = FLOATS(S * D);
    float *q = FLOATS(S * H * Dh), *k = FLOATS(S * K * Dh), *v = FLOATS(S * K * Dh);
    float *qn = FLOATS(S * H * Dh), *kn = FLOATS(S * K * Dh), *context = FLOATS(S * H * Dh);
    float *scores = FLOATS(H * S * S), *probs = FLOATS(H * S * S), *gate = FLOATS(S * F), *up = FLOATS(S * F);

    const float *embedding = tensor(file, "model.embed_tokens.weight", (size_t)V * D);
    for (int s = 0; s < S; s++) memcpy(x + s * D, embedding + ids[s] * D, sizeof(float) * D);
    dump(out, "model.embed_tokens", x, S, D, 0);

    rms_norm(h, x, WEIGHT("input_layernorm", D), S, D, eps);
    POINT(".input_layernorm", h, S, D, 0);
    linear(q, h, WEIGHT("self_attn.q_proj", H * Dh * D), S, D, H * Dh);
    linear(k, h, WEIGHT("self_attn.k_proj", K * Dh * D), S, D, K * Dh);
    linear(v, h, WEIGHT("self_attn.v_proj", K * Dh * D), S, D, K * Dh);
    POINT(".self_attn.q_proj", q, S, H * Dh, 0);
    POINT(".self_attn.k_proj", k, S, K * Dh, 0);
    POINT(".self_attn.v_proj", v, S, K * Dh, 0);
    rms_norm(qn, q, WEIGHT("self_attn.q_norm", Dh), S * H, Dh, eps); /* each head by itself, before the rotation */
    rms_norm(kn, k, WEIGHT("self_attn.k_norm", Dh), S * K, Dh, eps);
    POINT(".self_attn.q_norm", qn, S, H, Dh);
    POINT(".self_attn.k_norm", kn, S, K, Dh);
    rotate(q, qn, S, H, Dh, theta);
    rotate(k, kn, S, K, Dh, theta);
    POINT(".self_attn.q_rope", q, H, S, Dh);
    POINT(".self_attn.k_rope", k, K, S, Dh);

    for (int head = 0; head < H; head++)
        for (int s = 0; s < S; s++) {
            int shared = head / (H / K); /* head 0 to G - 1 share key head 0, the next G key head 1 */
            float *row = scores + (head * S + s) * S, *p = probs + (head * S + s) * S;
            for (int t = 0; t < S; t++) row[t] = -INFINITY;
            linear(row, q + (head * S + s) * Dh, k + shared * S * Dh, 1, Dh, s + 1);
            for (int t = 0; t <= s; t++) row[t] *= 1 / sqrtf(Dh);
            softmax(p, row, S);
            for (int i = 0; i < Dh; i++) {
                float sum = 0;
                for (int t = 0; t <= s; t++) sum += p[t] * v[(t * K + shared) * Dh + i];
                context[(s * H + head) * Dh + i] = sum;
            }
        }
    POINT(".self_attn.scores", scores, H, S, S);
    POINT(".self_attn.probs", probs, H, S, S);
    POINT(".self_attn.context", context, S, H * Dh, 0);
    linear(h, context, WEIGHT("self_attn.o_proj", D * H * Dh), S, H * Dh, D);
    POINT(".self_attn.o_proj", h, S, D, 0);
    for (int i = 0; i < S * D; i++) x[i] += h[i];
    POINT(".attn_residual", x, S, D, 0);

    rms_norm(h, x, WEIGHT("post_attention_layernorm", D), S, D, eps);
    POINT(".post_attention_layernorm", h, S, D, 0);
    linear(gate, h, WEIGHT("mlp.gate_proj", F * D), S, D, F);
    linear(up, h, WEIGHT("mlp.up_proj", F * D), S, D, F);
    POINT(".mlp.gate_proj", gate, S, F, 0);
    POINT(".mlp.up_proj", up, S, F, 0);
    for (int i = 0; i < S * F; i++) gate[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
    POINT(".mlp.act", gate, S, F, 0);
    linear(y, gate, WEIGHT("mlp.down_proj", D * F), S, F, D);
    POINT(".mlp.down_proj", y, S, D, 0);
    for (int i = 0; i < S * D; i++) x[i] += y[i];
    POINT("", x, S, D, 0);
    return 0;
}
