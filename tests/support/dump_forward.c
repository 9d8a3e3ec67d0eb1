/* Writes what the layer pass computes on given ids, for comparison with another implementation.
 *
 *   dump_forward [--compute f32|bf16] [--threads N] [--max-memory BYTES] [--seq-len N] MODEL IDS OUT
 *
 * IDS is a file of ids that ends in ".ids", one window a line. OUT is a safetensors file; T tokens of all windows:
 *   hidden.N [T,H]            input of layer N; hidden.<layers> is the last layer's output
 *   logits [T,V]
 *   router_logits.L [T,E+N]   L: the layer's index, for layers that have a router; N null experts
 *   topk_index.L [T,k] I32, topk_weight.L [T,k]   by descending weight, -1 and 0 behind the last */
#include "base/log.h"
#include "base/mem.h"
#include "base/par.h"
#include "calib/pass.h"
#include "ckpt/safetensors.h"
#include "num/vec.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct dump {
    const moec_model *m;
    int64_t tokens;
    moec_compute compute;
    moec_st_entry *entry; /* names are ours */
    void **data;
    size_t n, room;
    float *logits;        /* of the current layer, and so on */
    int32_t *ids;
    float *gates;
} dump;

/* Room for one more tensor [tokens, width]. */
static moec_status add(void **out, dump *d, moec_dtype dtype, int64_t width, moec_err *err, const char *name, int64_t layer)
{
    moec_st_entry *e = &d->entry[d->n];
    uint64_t at = d->n ? d->entry[d->n - 1].end : 0;
    size_t bytes = (size_t)d->tokens * (size_t)width * (size_t)moec_dtypes[dtype].bytes;
    moec_status st = layer < 0 ? moec_copy(&e->name, name, strlen(name), err)
                               : moec_format(&e->name, err, "%s.%lld", name, (long long)layer);
    if (st == MOEC_OK)
        st = moec_alloc(&d->data[d->n], bytes, 1, err);
    e->dtype = dtype;
    e->rank = 2;
    e->dim[0] = d->tokens;
    e->dim[1] = width;
    e->begin = at;
    e->end = at + bytes;
    *out = d->data[d->n++];
    return st;
}

static moec_status keep(void *ctx, int worker, const moec_chunk *c, const moec_moe_view *v, moec_err *err)
{
    const dump *d = ctx;
    const moec_dims *dims = &d->m->dims;
    size_t k = (size_t)dims->slots;
    (void)worker;
    (void)err;
    memcpy(d->logits + c->token * v->ld, v->logits, (size_t)v->n * (size_t)v->ld * sizeof *v->logits);
    memcpy(d->ids + c->token * dims->slots, v->ids, (size_t)v->n * k * sizeof *v->ids);
    memcpy(d->gates + c->token * dims->slots, v->gates, (size_t)v->n * k * sizeof *v->gates);
    return MOEC_OK;
}

static moec_status keep_hidden(dump *d, const moec_pass *p, int64_t point, moec_err *err)
{
    void *out;
    moec_status st = add(&out, d, MOEC_F32, d->m->dims.hidden, err, "hidden", point);
    return st == MOEC_OK ? moec_hidden_read(out, p->hidden, 0, d->tokens, err) : st;
}

static moec_status run_layers(dump *d, moec_pass *p, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_dims *dims = &d->m->dims;
    MOEC_TRY(moec_pass_embed(p, err));
    MOEC_TRY(keep_hidden(d, p, 0, err));
    for (int64_t i = 0; i < dims->layers; i++) {
        bool moe = d->m->layer[i].expert != NULL;
        if (moe) {
            MOEC_TRY(add((void **)&d->logits, d, MOEC_F32, dims->experts + dims->null_experts, err, "router_logits", i));
            MOEC_TRY(add((void **)&d->ids, d, MOEC_I32, dims->slots, err, "topk_index", i));
            MOEC_TRY(add((void **)&d->gates, d, MOEC_F32, dims->slots, err, "topk_weight", i));
        }
        MOEC_TRY(moec_pass_layer(p, i, moe ? keep : NULL, NULL, d, err));
        MOEC_TRY(keep_hidden(d, p, i + 1, err));
    }
done:
    return st;
}

/* Final norm of the last hidden states, which are the entry added last. */
static moec_status final_norm(float *x, const dump *d, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_model *m = d->m;
    const float *last = d->data[d->n - 2];
    int64_t width = m->dims.hidden;
    float *norm = NULL, *bias = NULL, eps = (float)m->dims.norm_eps;
    MOEC_TRY(MOEC_NEW(norm, (size_t)width, err));
    MOEC_TRY(MOEC_NEW(bias, (size_t)width, err));
    moec_dtypes[m->final_norm->dtype].to_f32(norm, m->final_norm->data, width);
    if (m->final_norm_bias)
        moec_dtypes[m->final_norm_bias->dtype].to_f32(bias, m->final_norm_bias->data, width);
    for (int64_t i = 0; i < width; i++)
        norm[i] += m->family->norm == MOEC_NORM_RMS_PLUS1 ? 1.0f : 0.0f;
    for (int64_t t = 0; t < d->tokens; t++)
        if (m->family->norm == MOEC_NORM_LAYER)
            moec_layer_norm(x + t * width, last + t * width, norm, bias, width, eps);
        else
            moec_rms_norm(x + t * width, last + t * width, norm, width, eps);
done:
    moec_free(norm);
    moec_free(bias);
    return st;
}

static moec_status add_logits(dump *d, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_dims *dims = &d->m->dims;
    size_t width = (size_t)dims->hidden, padded = (size_t)moec_panels(d->tokens) * MOEC_PANEL;
    float *x = NULL, *panels = NULL, *z = NULL, *bias = NULL, *out;
    void *scratch = NULL;
    MOEC_TRY(add((void **)&out, d, MOEC_F32, dims->vocab, err, "logits", -1));
    MOEC_TRY(MOEC_NEW(x, (size_t)d->tokens * width, err));
    MOEC_TRY(MOEC_NEW(panels, padded * width, err));
    MOEC_TRY(MOEC_NEW(z, padded * (size_t)dims->vocab, err));
    MOEC_TRY(MOEC_NEW(bias, (size_t)dims->vocab, err));
    MOEC_TRY(moec_alloc(&scratch, moec_gemm_scratch_bytes(d->compute, d->tokens, dims->hidden), 1, err));
    MOEC_TRY(final_norm(x, d, err));
    if (d->m->head_bias)
        moec_dtypes[d->m->head_bias->dtype].to_f32(bias, d->m->head_bias->data, dims->vocab);
    moec_panel_pack(panels, x, dims->hidden, NULL, d->tokens, dims->hidden);
    MOEC_TRY(moec_gemm_weight(z, panels, d->tokens, &d->m->head, d->compute, scratch, err));
    moec_panel_unpack(out, dims->vocab, z, d->tokens, dims->vocab);
    for (int64_t i = 0; i < d->tokens * dims->vocab; i++)
        out[i] = (out[i] + bias[i % dims->vocab]) / (float)dims->logit_scale;
done:
    moec_free(x);
    moec_free(bias);
    moec_free(panels);
    moec_free(z);
    moec_free(scratch);
    return st;
}

static moec_status write_file(const dump *d, const char *path, moec_err *err)
{
    char *header = NULL;
    size_t len;
    moec_status st = moec_st_header(&header, &len, d->entry, d->n, NULL, err);
    if (st != MOEC_OK)
        return st;
    FILE *f = fopen(path, "wb");
    bool good = f && fwrite(header, 1, len, f) == len;
    for (size_t i = 0; good && i < d->n; i++) {
        size_t bytes = (size_t)(d->entry[i].end - d->entry[i].begin);
        good = fwrite(d->data[i], 1, bytes, f) == bytes;
    }
    if (f && fclose(f) != 0)
        good = false;
    moec_free(header);
    return good ? MOEC_OK : moec_fail(err, MOEC_EIO, "%s: cannot be written", path);
}

static moec_status dump_all(const char *const *path, moec_compute compute, uint64_t max_memory, int64_t seq_len, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_model *m = NULL;
    moec_corpus corpus = {0};
    moec_pass *p = NULL;
    dump d = {.compute = compute};
    MOEC_TRY(moec_model_open(&m, path[0], err));
    moec_corpus_opts co = {.vocab = m->dims.vocab, .seq_len = seq_len, .seed = -1, .bos = -1};
    MOEC_TRY(moec_corpus_read(&corpus, path + 1, 1, NULL, &co, err));
    moec_pass_opts po = {.compute = compute, .watch = true, .max_memory = max_memory, .what = "dump"};
    MOEC_TRY(moec_pass_new(&p, m, &corpus, &po, err));
    d.m = m;
    d.tokens = p->n_tokens;
    d.room = (size_t)(4 * m->dims.layers + 2);
    MOEC_TRY(MOEC_NEW(d.entry, d.room, err));
    MOEC_TRY(MOEC_NEW(d.data, d.room, err));
    MOEC_TRY(run_layers(&d, p, err));
    MOEC_TRY(add_logits(&d, err));
    st = write_file(&d, path[2], err);
done:
    for (size_t i = 0; i < d.n; i++) {
        moec_free(d.entry[i].name);
        moec_free(d.data[i]);
    }
    moec_free(d.entry);
    moec_free(d.data);
    moec_pass_free(p);
    moec_corpus_release(&corpus);
    moec_model_close(m);
    return st;
}

int main(int argc, char **argv)
{
    moec_err err = {MOEC_OK, ""};
    moec_compute compute = MOEC_COMPUTE_F32;
    uint64_t max_memory = 0;
    int64_t seq_len = 1 << 20;
    int at = 1;
    for (; at + 1 < argc && strncmp(argv[at], "--", 2) == 0; at += 2) {
        const char *name = argv[at] + 2, *value = argv[at + 1];
        if (strcmp(name, "compute") == 0)
            compute = strcmp(value, "bf16") == 0 ? MOEC_COMPUTE_BF16 : MOEC_COMPUTE_F32;
        else if (strcmp(name, "threads") == 0)
            moec_par_set_threads((int)strtol(value, NULL, 10));
        else if (strcmp(name, "max-memory") == 0)
            max_memory = strtoull(value, NULL, 10);
        else if (strcmp(name, "seq-len") == 0)
            seq_len = strtoll(value, NULL, 10);
        else
            break;
    }
    if (argc - at != 3) {
        fprintf(stderr, "usage: dump_forward [--compute f32|bf16] [--threads N] [--max-memory BYTES] [--seq-len N] "
                        "MODEL IDS OUT\n");
        return 2;
    }
    moec_log_set(MOEC_QUIET);
    moec_status st = dump_all((const char *const *)argv + at, compute, max_memory, seq_len, &err);
    if (st != MOEC_OK)
        fprintf(stderr, "dump_forward: %s\n", err.text);
    return moec_exit_code(st);
}
