// As much of llama.h and ggml.h as example/llama_dump.cpp uses. The "model" makes three tensors of the ids of a batch:
// floats, a view of integers with a stride, and one of a kind that is not wanted.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>

enum ggml_type { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_I32 };
struct ggml_tensor { ggml_type type; int64_t ne[4]; size_t nb[4]; char name[64]; char * data; };
static int ggml_n_dims(const ggml_tensor * t) { int n = 4; while (n > 1 && t->ne[n - 1] == 1) n--; return n; }
static int64_t ggml_nelements(const ggml_tensor * t) { return t->ne[0] * t->ne[1] * t->ne[2] * t->ne[3]; }
static size_t ggml_nbytes(const ggml_tensor * t) {
    size_t n = 4;
    for (int i = 0; i < 4; i++) n += (t->ne[i] - 1) * t->nb[i];
    return n;
}
static void ggml_backend_tensor_get(const ggml_tensor * t, void * to, size_t offset, size_t size) { memcpy(to, t->data + offset, size); }

typedef bool (*callback)(ggml_tensor *, bool, void *);
enum llama_flash_attn_type { LLAMA_FLASH_ATTN_TYPE_AUTO = -1, LLAMA_FLASH_ATTN_TYPE_DISABLED = 0 };
struct llama_model {};
struct llama_model_params {};
struct llama_context_params { uint32_t n_ctx, n_batch, n_ubatch; ggml_type type_k, type_v; llama_flash_attn_type flash_attn_type; callback cb_eval; void * cb_eval_user_data; };
struct llama_context { llama_context_params p; };
struct llama_batch { int32_t n_tokens; int32_t * token; int32_t * pos; int32_t * n_seq_id; int32_t ** seq_id; int8_t * logits; };
static void llama_backend_init() {}
static llama_model_params llama_model_default_params() { return {}; }
static llama_context_params llama_context_default_params() { return {0, 0, 0, GGML_TYPE_F16, GGML_TYPE_F16, LLAMA_FLASH_ATTN_TYPE_AUTO, nullptr, nullptr}; }
static llama_model * llama_model_load_from_file(const char *, llama_model_params) { return new llama_model; }
static llama_context * llama_init_from_model(llama_model *, llama_context_params p) {
    return p.type_k == GGML_TYPE_F32 && p.type_v == GGML_TYPE_F32 && !p.flash_attn_type ? new llama_context{p} : nullptr;
}
static void llama_free(llama_context * c) { delete c; }
static void llama_model_free(llama_model * m) { delete m; }
static llama_batch llama_batch_init(int32_t n, int32_t, int32_t) {
    llama_batch b = {0, new int32_t[n], new int32_t[n], new int32_t[n], new int32_t *[n], new int8_t[n]};
    for (int i = 0; i < n; i++) b.seq_id[i] = new int32_t[1];
    return b;
}
static void llama_batch_free(llama_batch) {}
static int llama_decode(llama_context * c, llama_batch b) {
    const int64_t n = b.n_tokens;
    float * x = new float[2 * n];
    int32_t * k = new int32_t[3 * n];
    for (int i = 0; i < n; i++) {
        x[2 * i] = b.token[i] + 0.5f, x[2 * i + 1] = b.pos[i];
        for (int j = 0; j < 3; j++) k[3 * i + j] = 10 * b.pos[i] + j;
    }
    ggml_tensor all[] = {
        {GGML_TYPE_F32, {2, n, 1, 1}, {4, 8, size_t(8 * n), size_t(8 * n)}, "l_out-0", (char *) x},
        {GGML_TYPE_I32, {2, n, 1, 1}, {4, 12, size_t(12 * n), size_t(12 * n)}, "ffn_moe_topk-0", (char *) k},
        {GGML_TYPE_F16, {1, 1, 1, 1}, {2, 2, 2, 2}, "cache_k_l0", (char *) x},
        {GGML_TYPE_F32, {1, 1, 1, 1}, {4, 4, 4, 4}, "Qcur-0 (view)", (char *) x},
    };
    for (ggml_tensor & t : all)
        if (c->p.cb_eval(&t, true, c->p.cb_eval_user_data) && !c->p.cb_eval(&t, false, c->p.cb_eval_user_data)) return 1;
    return 0;
}
