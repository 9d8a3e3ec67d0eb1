/* What each client asks of a checkpoint, as rows. The binder has already made sure of one count of experts for all layers and
 * of top-k <= experts, which every client needs.
 * Source: loaders of transformers 5.23, vLLM and llama.cpp's converter, as far as they differ. */
#include "run/verify.h"

#include "base/file.h"
#include "base/mem.h"

#include <stddef.h>
#include <stdio.h>

static const struct client_rule {
    const char *name;
    size_t flag;         /* offset of the family's bool */
    int64_t max_experts; /* 0: no bound */
    bool needs_tokenizer; /* to load it at all; the others take token ids */
    const char *good, *unknown;
} rules[] = {
    {"transformers", offsetof(moec_family, loads_transformers), 0, false,
     "one expert count in config.json and in all layers", "the family has no class there"},
    {"vllm", offsetof(moec_family, loads_vllm), 0, false,
     "sizes its fused experts from config.json; top-k <= experts", "the family has no class there"},
    {"llama.cpp", offsetof(moec_family, loads_llama_cpp), 512, true,
     "the converter finds every expert tensor of each layer", "the converter does not know the family"},
};
_Static_assert(sizeof rules / sizeof rules[0] <= MOEC_VERIFY_CLIENTS, "one place per client");

static bool has_tokenizer(const moec_model *m)
{
    static const char *const names[] = {"tokenizer.json", "tokenizer.model"};
    bool found = false;
    for (size_t i = 0; i < MOEC_COUNT(names); i++) {
        char *path;
        if (moec_path_join(&path, moec_ckpt_dir(m->ckpt), names[i], NULL) != MOEC_OK)
            return true; /* out of memory: say nothing against the folder */
        found = found || moec_path_exists(path);
        moec_free(path);
    }
    return found;
}

int moec_clients(moec_client *out, const moec_model *m)
{
    int n = 0;
    for (; n < (int)MOEC_COUNT(rules); n++) {
        const struct client_rule *r = &rules[n];
        bool known = *(const bool *)((const char *)m->family + r->flag);
        bool fits = r->max_experts == 0 || m->dims.experts <= r->max_experts;
        bool words = !r->needs_tokenizer || has_tokenizer(m);
        out[n] = (moec_client){.name = r->name, .loads = known && fits && words};
        if (known && !fits)
            snprintf(out[n].reason, sizeof out[n].reason, "takes at most %lld experts, the model has %lld",
                     (long long)r->max_experts, (long long)m->dims.experts);
        else
            snprintf(out[n].reason, sizeof out[n].reason, "%s",
                     !known ? r->unknown : !words ? "its converter needs the tokenizer's files" : r->good);
    }
    return n;
}
