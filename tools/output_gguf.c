/* See output_gguf.h. */
#include "output_gguf.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

enum { KINDS = 12 };

/* What people call the tensors, by a part of their names; the first that is found. */
static const struct {
    const char *part, *name;
} kinds[KINDS] = {{"ffn_gate_exps", "experts gate"}, {"ffn_up_exps", "experts up"}, {"ffn_down_exps", "experts down"}, {"_shexp", "shared experts"},
                  {"attn_", "attention"}, {"ffn_gate_inp", "routers"}, {"ffn_gate.", "dense gate"}, {"ffn_up.", "dense up"},
                  {"ffn_down.", "dense down"}, {"token_embd", "embeddings"}, {"output.", "head"}, {"", "others"}};

static int kind_of(const moec_gguf_model *x, size_t i)
{
    const char *name = moec_gguf_model_at(x, i)->name;
    int k = 0;
    if (!moec_gguf_model_matrix(x, i))
        return strstr(name, "ffn_gate_inp.") ? 5 : KINDS - 1;
    while (!strstr(name, kinds[k].part))
        k++;
    return k;
}

static int64_t values_of(const moec_gguf_tensor *t)
{
    return t->dim[0] * t->dim[1] * t->dim[2] * t->dim[3];
}

void tool_gguf_say_fallen(const moec_gguf_model *x, const moec_gguf_types *t)
{
    for (size_t i = 0; i < t->n; i++) {
        const int64_t cols = moec_gguf_model_at(x, i)->dim[0];
        int64_t n = 0;
        if (t->asked[i] == MOEC_BLOCK_COUNT || t->asked[i] == t->type[i])
            continue;
        for (size_t k = 0; k < t->n; k++) {
            const bool same = kind_of(x, k) == kind_of(x, i) && t->asked[k] == t->asked[i] && t->type[k] == t->type[i] &&
                              moec_gguf_model_at(x, k)->dim[0] == cols;
            n += same;
            if (same && k < i) { /* said */
                n = -1;
                break;
            }
        }
        if (n > 0)
            moec_say("%s: rows of %" PRId64 " are not whole blocks of %s: %s instead, in %" PRId64 " tensor%s", kinds[kind_of(x, i)].name, cols,
                     moec_blocks[t->asked[i]].name, moec_blocks[t->type[i]].name, n, tool_s(n));
    }
}

typedef struct tally {
    int64_t tensors, values, bytes;
} tally;

static void count(tally out[KINDS][MOEC_GGML_COUNT], const moec_gguf_model *x)
{
    memset(out, 0, sizeof(tally) * KINDS * MOEC_GGML_COUNT);
    for (size_t i = 0; i < moec_gguf_model_count(x); i++) {
        const moec_gguf_tensor *t = moec_gguf_model_at(x, i);
        tally *a = &out[kind_of(x, i)][t->type];
        a->tensors++;
        a->values += values_of(t);
        a->bytes += (int64_t)moec_gguf_padded_bytes(t);
    }
}

static void print_tensors(const moec_gguf_model *x)
{
    printf("%-40s %-22s %-8s %14s\n", "tensor", "shape", "type", "bytes");
    for (size_t i = 0; i < moec_gguf_model_count(x); i++) {
        const moec_gguf_tensor *t = moec_gguf_model_at(x, i);
        char shape[64] = "";
        for (int k = t->rank - 1, at = 0; k >= 0; k--)
            at += snprintf(shape + at, sizeof shape - (size_t)at, "%s%" PRId64, at > 0 ? "x" : "", t->dim[k]);
        printf("%-40s %-22s %-8s %14" PRId64 "\n", t->name, shape, moec_ggml_type(t->type)->name, (int64_t)moec_gguf_padded_bytes(t));
    }
    printf("\n");
}

static moec_json *tensors_json(const moec_gguf_model *x)
{
    moec_json *list = moec_json_new_array();
    for (size_t i = 0; i < moec_gguf_model_count(x); i++) {
        const moec_gguf_tensor *t = moec_gguf_model_at(x, i);
        moec_json *o = moec_json_new_object(), *shape = moec_json_new_array();
        for (int k = t->rank - 1; k >= 0; k--)
            moec_json_push(shape, moec_json_new_int(t->dim[k]));
        moec_json_set(o, "name", moec_json_new_string(t->name));
        moec_json_set(o, "shape", shape);
        moec_json_set(o, "type", moec_json_new_string(moec_ggml_type(t->type)->name));
        moec_json_set(o, "bytes", moec_json_new_int((int64_t)moec_gguf_padded_bytes(t)));
        moec_json_push(list, o);
    }
    return list;
}

static moec_json *kinds_json(tally (*sum)[MOEC_GGML_COUNT])
{
    moec_json *list = moec_json_new_array();
    for (int k = 0; k < KINDS; k++)
        for (int t = 0; t < MOEC_GGML_COUNT; t++) {
            const tally *a = &sum[k][t];
            if (a->tensors == 0)
                continue;
            moec_json *o = moec_json_new_object();
            moec_json_set(o, "kind", moec_json_new_string(kinds[k].name));
            moec_json_set(o, "type", moec_json_new_string(moec_ggml_type((uint32_t)t)->name));
            moec_json_set(o, "tensors", moec_json_new_int(a->tensors));
            moec_json_set(o, "bits", moec_json_new_real(8.0 * (double)a->bytes / (double)a->values));
            moec_json_set(o, "bytes", moec_json_new_int(a->bytes));
            moec_json_push(list, o);
        }
    return list;
}

static moec_status print_json(const tool_gguf_result *r, tally (*sum)[MOEC_GGML_COUNT], moec_err *err)
{
    const moec_gguf_types *t = r->types;
    moec_json *o = moec_json_new_object();
    moec_json_set(o, "format", moec_json_new_string("gguf"));
    moec_json_set(o, "output", r->output && !r->common->dry_run ? moec_json_new_string(r->output) : moec_json_new_null());
    moec_json_set(o, "dry_run", moec_json_new_bool(r->common->dry_run));
    moec_json_set(o, "files", moec_json_new_int((int64_t)r->files));
    moec_json_set(o, "file_bytes", moec_json_new_int((int64_t)r->bytes));
    moec_json_set(o, "tensor_bytes", moec_json_new_int((int64_t)t->bytes));
    moec_json_set(o, "bits", moec_json_new_real(t->bits));
    moec_json_set(o, "expected_kl", moec_json_new_real(t->cost));
    moec_json_set(o, "bound", moec_json_new_real(t->bound));
    moec_json_set(o, "proven", moec_json_new_bool(t->proven));
    moec_json_set(o, "tokens", moec_json_new_int(r->tokens));
    moec_json_set(o, "unseen_experts", r->unseen >= 0 ? moec_json_new_int(r->unseen) : moec_json_new_null());
    moec_json_set(o, "fell_back", moec_json_new_int((int64_t)t->fell_back));
    moec_json_set(o, "kinds", kinds_json(sum));
    if (r->tensors)
        moec_json_set(o, "tensors", tensors_json(r->x));
    moec_json_set(o, "seconds", moec_json_new_real(r->seconds));
    moec_json_set(o, "peak_memory_bytes", moec_json_new_int((int64_t)moec_peak_memory()));
    return tool_print_json(o, err);
}

moec_status tool_gguf_print(const tool_gguf_result *r, moec_err *err)
{
    tally sum[KINDS][MOEC_GGML_COUNT];
    char size[32], peak[32];
    const moec_gguf_types *t = r->types;
    count(sum, r->x);
    if (r->common->json)
        return print_json(r, sum, err);
    if (r->tensors)
        print_tensors(r->x);
    printf("%-16s %-8s %8s %8s %14s\n", "kind", "type", "tensors", "bits", "bytes");
    for (int k = 0; k < KINDS; k++)
        for (int type = 0; type < MOEC_GGML_COUNT; type++) {
            const tally *a = &sum[k][type];
            if (a->tensors > 0)
                printf("%-16s %-8s %8" PRId64 " %8.3f %14" PRId64 "\n", kinds[k].name, moec_ggml_type((uint32_t)type)->name, a->tensors,
                       8.0 * (double)a->bytes / (double)a->values, a->bytes);
        }
    printf("\nbits        %.4f of a matrix's weight\n", t->bits);
    if (!isnan(t->cost))
        printf("expected KL %.5g nats a token from the model that is quantized, measured over %" PRId64 " tokens matrix by matrix%s\n",
               t->cost, r->tokens,
               isnan(t->bound) ? "" : t->proven ? ";\n            no choice of the same size is expected to be better"
                                                : ";\n            the time for a proof was over");
    if (r->unseen > 0)
        printf("unseen      %" PRId64 " expert%s that no token of the statistics reached: weighed like the layer\n", r->unseen, tool_s(r->unseen));
    bool ternary = false;
    for (int k = 0; k < KINDS; k++)
        ternary = ternary || sum[k][MOEC_GGML_TQ1_0].tensors > 0 || sum[k][MOEC_GGML_TQ2_0].tensors > 0;
    if (ternary)
        printf("ternary     TQ1_0, TQ2_0: llama.cpp's CPU backend has them, most others do not; --candidates without them gives a file for all\n");
    printf("%-11s %" PRIu64 " bytes (%s) in %zu file%s%s%s\n", r->common->dry_run ? "would be" : "written", r->bytes,
           moec_size_text(size, sizeof size, r->bytes), r->files, tool_s((int64_t)r->files), r->output ? ": " : "", r->output ? r->output : "");
    printf("peak        %s of memory, %.1f s\n", moec_size_text(peak, sizeof peak, moec_peak_memory()), r->seconds);
    return MOEC_OK;
}
