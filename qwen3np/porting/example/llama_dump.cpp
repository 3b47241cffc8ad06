// Writes every tensor that llama.cpp names in its graph as a .npy file, for `qwen3np compare`:
//
//   c++ -std=c++17 -Illama.cpp/include -Illama.cpp/ggml/include llama_dump.cpp -Lbuild/bin -lllama -lggml -lggml-base -o llama_dump
//   ./llama_dump golden/tied/model.gguf mine 256 $(python -c 'import json; p = json.load(open("golden/tied/values/ids.json")); print(*p["prompt"], *p["decode"])')
//
// The arguments are a model, a folder that exists, the length of the prompt, and all ids; those after the prompt are fed
// one by one. Of several tensors of one name in a pass the last is kept. The cache is float32, attention is not fused.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "ggml.h"
#include "llama.h"

struct Dump {
    std::string folder, prefix;
};

static void write_npy(const std::string & path, const ggml_tensor * t, const std::vector<char> & values) {
    std::string shape;
    for (int i = ggml_n_dims(t) - 1; i >= 0; i--) shape += std::to_string(t->ne[i]) + ",";  // NumPy's order
    std::string head = "{'descr': '" + std::string(t->type == GGML_TYPE_F32 ? "<f4" : "<i4") +
                       "', 'fortran_order': False, 'shape': (" + shape + "), }";
    head.resize((head.size() + 11 + 63) / 64 * 64 - 10, ' ');
    head.back() = '\n';
    FILE * file = fopen(path.c_str(), "wb");
    if (!file) { perror(path.c_str()); exit(1); }
    const unsigned char start[] = {0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, (unsigned char) (head.size() & 255), (unsigned char) (head.size() >> 8)};
    fwrite(start, 1, sizeof start, file);
    fwrite(head.data(), 1, head.size(), file);
    fwrite(values.data(), 1, values.size(), file);
    fclose(file);
}

// llama.cpp asks for each tensor whether it is wanted, and then gives it when it is computed.
static bool dump(ggml_tensor * t, bool ask, void * data) {
    const std::string name = t->name;
    const bool wanted = (t->type == GGML_TYPE_F32 || t->type == GGML_TYPE_I32) && name.find_first_of(" (/") == std::string::npos;
    if (ask || !wanted) return ask ? wanted : true;
    std::vector<char> raw(ggml_nbytes(t)), values;
    ggml_backend_tensor_get(t, raw.data(), 0, raw.size());
    values.reserve(4 * ggml_nelements(t));
    for (int64_t i3 = 0; i3 < t->ne[3]; i3++)  // a view has strides of its own
        for (int64_t i2 = 0; i2 < t->ne[2]; i2++)
            for (int64_t i1 = 0; i1 < t->ne[1]; i1++)
                for (int64_t i0 = 0; i0 < t->ne[0]; i0++) {
                    const char * at = raw.data() + i0 * t->nb[0] + i1 * t->nb[1] + i2 * t->nb[2] + i3 * t->nb[3];
                    values.insert(values.end(), at, at + 4);
                }
    const Dump & to = *static_cast<Dump *>(data);
    write_npy(to.folder + "/" + to.prefix + name + ".npy", t, values);
    return true;
}

int main(int argc, char ** argv) {
    if (argc < 5) { fprintf(stderr, "usage: %s MODEL.gguf FOLDER PROMPT_LENGTH ID...\n", argv[0]); return 2; }
    Dump to = {argv[2], ""};
    const int prompt = atoi(argv[3]), total = argc - 4;
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) return 1;
    llama_context_params wanted = llama_context_default_params();
    wanted.n_ctx = wanted.n_batch = wanted.n_ubatch = total;
    wanted.type_k = wanted.type_v = GGML_TYPE_F32;
    wanted.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    wanted.cb_eval = dump;
    wanted.cb_eval_user_data = &to;
    llama_context * context = llama_init_from_model(model, wanted);
    if (!context) return 1;
    for (int start = 0, count = prompt; start < total; start += count, count = 1) {
        if (start) to.prefix = "decode." + std::to_string(start - prompt) + ".";
        llama_batch batch = llama_batch_init(count, 0, 1);
        batch.n_tokens = count;
        for (int i = 0; i < count; i++) {
            batch.token[i] = atoi(argv[4 + start + i]);
            batch.pos[i] = start + i;
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i] = 1;  // of all positions: otherwise the last layer computes no more than the last one
        }
        if (llama_decode(context, batch)) return 1;
        llama_batch_free(batch);
    }
    llama_free(context);
    llama_model_free(model);
}
