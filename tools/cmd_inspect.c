/* inspect: what a model is, what it weighs, who loads it, and what about it is unusual. Reads headers only, no weights. */
#include "inspect_written.h"

#include <stdarg.h>
#include <string.h>

typedef struct inspect_params {
    tool_common common;
} inspect_params;

static const moec_opt rows[] = {
    TOOL_COMMON_ROWS(inspect_params),
    TOOL_END_ROW,
};

enum { NOTES_MAX = 32 };

/* Everything both outputs show. */
typedef struct facts {
    const moec_model *model;
    moec_sizes sizes;
    uint64_t dtype_tensors[MOEC_DTYPE_COUNT], dtype_bytes[MOEC_DTYPE_COUNT];
    bool tokenizer;
    char note[NOTES_MAX][200]; /* what is unusual */
    int n_notes;
} facts;

static void note(facts *f, const char *fmt, ...) MOEC_PRINTF(2, 3);
static void note(facts *f, const char *fmt, ...)
{
    if (f->n_notes >= NOTES_MAX)
        return;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(f->note[f->n_notes], sizeof f->note[0], fmt, ap);
    moec_plain_line(f->note[f->n_notes++]); /* tensor names come from a file */
    va_end(ap);
}

/* --- what is unusual ---------------------------------------------------------------------------------------------- */

static const char *const rope_names[] = {
    [MOEC_ROPE_DEFAULT] = "default", [MOEC_ROPE_LINEAR] = "linear", [MOEC_ROPE_DYNAMIC] = "dynamic",
    [MOEC_ROPE_YARN] = "yarn",       [MOEC_ROPE_LLAMA3] = "llama3", [MOEC_ROPE_LONGROPE] = "longrope",
};

static void note_dense(facts *f)
{
    const moec_dims *d = &f->model->dims;
    char list[120] = "";
    size_t n = 0;
    if (f->model->moe_layers == d->layers)
        return;
    for (int64_t i = 0; i < d->layers && n + 24 < sizeof list; i++)
        if (!f->model->layer[i].expert)
            n += (size_t)snprintf(list + n, sizeof list - n, "%s%lld", n ? ", " : "", (long long)i);
    note(f, "%lld dense layer%s without a router: %s%s", (long long)(d->layers - f->model->moe_layers),
         tool_s(d->layers - f->model->moe_layers), list, n + 24 < sizeof list ? "" : ", ...");
}

static void note_window(facts *f)
{
    int64_t window = 0, chunk = 0, windows = 0, chunks = 0;
    for (int64_t i = 0; i < f->model->dims.layers; i++) {
        const moec_layer *l = &f->model->layer[i];
        window = l->window > window ? l->window : window;
        chunk = l->chunk > chunk ? l->chunk : chunk;
        windows += l->window > 0;
        chunks += l->chunk > 0;
    }
    if (windows == f->model->dims.layers)
        note(f, "attention sees the last %lld tokens only (sliding window)", (long long)window);
    else if (windows > 0)
        note(f, "attention of %lld layer%s sees the last %lld tokens only (sliding window)", (long long)windows,
             tool_s(windows), (long long)window);
    if (chunks > 0)
        note(f, "attention of %lld layer%s sees its own chunk of %lld tokens only", (long long)chunks, tool_s(chunks),
             (long long)chunk);
}

static void note_shape(facts *f)
{
    const moec_model *m = f->model;
    const moec_dims *d = &m->dims;
    if (d->tied)
        note(f, "the output head is the embedding (tied)");
    note_dense(f);
    note_window(f);
    if (d->rope.kind != MOEC_ROPE_DEFAULT)
        note(f, "rotary positions are scaled: %s, factor %g", rope_names[d->rope.kind], d->rope.factor);
    if (m->mtp_layers > 0)
        note(f, "%lld multi-token-prediction layer%s with experts, which calibration does not run; prune leaves as many experts "
             "there as in the others, or leaves the layer%s out (--mtp drop)", (long long)m->mtp_layers, tool_s(m->mtp_layers),
             tool_s(m->mtp_layers));
    if (m->family->n_tail > 0)
        note(f, "%lld experts of a layer have no network (constants, a copy, nothing); they are not among those counted here, and "
             "prune keeps them all", (long long)d->null_experts);
    else if (d->null_experts > 0)
        note(f, "%lld row%s of the router stand%s for experts that do nothing", (long long)d->null_experts,
             tool_s(d->null_experts), d->null_experts == 1 ? "s" : "");
    if (d->top_k_softmax)
        note(f, "the k largest logits are chosen, and weighted by the softmax over these");
    if (!m->family->key_top_k[0])
        note(f, "top-k cannot change: no key of config.json says it");
    else if (!moec_top_k_may_shrink(m))
        note(f, "top-k cannot change: the form of the layers depends on it");
    if (m->config_at && m->config_at[0])
        note(f, "the language model is one part of the checkpoint (%.*s); the other parts are copied as they are",
             (int)strlen(m->config_at) - 1, m->config_at);
}

/* --- in words --------------------------------------------------------------------------------------------------------- */

/* How tokens are mixed: "latent (MLA)", "grouped-query in 12 layers, gated delta net in 36 layers". */
static const char *mixer_text(char *buf, size_t cap, const moec_model *m)
{
    const char *const names[] = {
        [MOEC_MIXER_ATTENTION] = m->dims.heads == m->dims.kv_heads ? "multi-head" : "grouped-query",
        [MOEC_MIXER_LATENT] = "latent (MLA)", [MOEC_MIXER_CONV] = "short convolution",
        [MOEC_MIXER_DELTA] = "gated delta net", [MOEC_MIXER_HEADS] = "attention experts"};
    size_t n = 0;
    buf[0] = '\0';
    for (size_t k = 0; k < MOEC_COUNT(names); k++) {
        int64_t layers = 0;
        for (int64_t i = 0; i < m->dims.layers; i++)
            layers += (size_t)m->layer[i].mixer == k;
        if (layers == m->dims.layers)
            snprintf(buf, cap, "%s", names[k]);
        else if (layers > 0 && n < cap)
            n += (size_t)snprintf(buf + n, cap - n, "%s%s in %lld layer%s", n ? ", " : "", names[k], (long long)layers,
                                  tool_s(layers));
    }
    return buf;
}

static const moec_layer *first_moe(const moec_model *m)
{
    return &m->layer[m->set[0].layer];
}

/* How the experts lie in the files. */
static const char *storage_text(const moec_model *m)
{
    static const char *const layouts[] = {
        [MOEC_LAYOUT_SPLIT] = "one tensor each",
        [MOEC_LAYOUT_OUT_IN] = "stacked in one tensor a layer, rows are outputs",
        [MOEC_LAYOUT_IN_OUT] = "stacked in one tensor a layer, rows are inputs",
        [MOEC_LAYOUT_IN_OUT_PAIRS] = "stacked in one tensor a layer, rows are inputs, gate and up interleaved",
        [MOEC_LAYOUT_MXFP4_PAIRS] = "stacked MXFP4 blocks of 32 values with a shared exponent",
        [MOEC_LAYOUT_FLAT] = "stacked flat in one matrix a layer"};
    const moec_layer *l = first_moe(m);
    if (moec_ckpt_gguf(m->ckpt))
        return l->expert[0].gate.storage == MOEC_BLOCKS ? "ggml blocks, stacked in three tensors a layer (GGUF)"
                                                        : "stacked in three tensors a layer (GGUF)";
    if (l->expert[0].gate.storage == MOEC_FP8)
        return "FP8 (e4m3) with one scale a block, one tensor each";
    if (l->expert[0].gate.storage == MOEC_GPTQ)
        return "codes of few bits (GPTQ), one matrix each";
    if (l->expert[0].gate.storage == MOEC_PACKED)
        return "codes of few bits (compressed-tensors), one matrix each";
    if (l->expert[0].gate.storage == MOEC_NESTED)
        return "nested codes of few bits, one matrix each";
    return layouts[l->layout];
}

static bool in_codes(const moec_weight *w)
{
    return w->storage == MOEC_GPTQ || w->storage == MOEC_PACKED || w->storage == MOEC_NESTED || w->storage == MOEC_BLOCKS;
}

/* Bits of codes, and of the files, of a value of a layer's experts; layer -1: of all. False: none is in codes. */
static bool expert_bits(double *codes, double *files, const moec_model *m, int64_t layer)
{
    double values = 0.0, bits = 0.0, bytes = 0.0;
    bool any = false;
    for (int64_t i = 0; m->packed && i < m->moe_layers; i++) {
        const moec_layer *l = &m->layer[m->set[i].layer];
        if (layer >= 0 && l->index != layer)
            continue;
        for (int64_t k = 0; k < 3 * m->dims.experts; k++) {
            const moec_mlp *e = &l->expert[k / 3];
            const moec_weight *w = k % 3 == 0 ? &e->gate : k % 3 == 1 ? &e->up : &e->down;
            const double n = (double)w->rows * (double)w->cols;
            any = any || in_codes(w);
            values += n;
            bits += w->storage == MOEC_BLOCKS ? 8.0 * (double)moec_weight_bytes(w)
                                              : n * (in_codes(w) ? w->bits : 8 * moec_dtypes[w->of->dtype].bytes);
            bytes += (double)moec_weight_bytes(w);
        }
    }
    *codes = values > 0.0 ? bits / values : 0.0;
    *files = values > 0.0 ? 8.0 * bytes / values : 0.0;
    return any;
}

static const char *weights_name(const moec_model *m)
{
    static const char *const names[] = {[MOEC_PLAIN] = NULL,  [MOEC_FP8] = "fp8-block",     [MOEC_MXFP4] = "mxfp4",
                                        [MOEC_GPTQ] = "gptq", [MOEC_PACKED] = "packed-codes", [MOEC_NESTED] = "nested",
                                        [MOEC_BLOCKS] = "ggml-blocks"};
    const moec_weight *w = &first_moe(m)->expert[0].gate;
    return names[w->storage] ? names[w->storage] : moec_dtypes[w->of->dtype].name;
}

static void note_dtypes(facts *f)
{
    int most = 0;
    if (moec_json_get(moec_ckpt_config(f->model->ckpt), "quantization_config"))
        return; /* values, scales and what was left alone are of different types: nothing unusual */
    for (int t = 1; t < MOEC_DTYPE_COUNT; t++)
        if (f->dtype_bytes[t] > f->dtype_bytes[most])
            most = t;
    for (int t = 0; t < MOEC_DTYPE_COUNT; t++)
        if (t != most && f->dtype_tensors[t])
            note(f, "%llu tensor%s %s among %s", (unsigned long long)f->dtype_tensors[t],
                 f->dtype_tensors[t] == 1 ? " is" : "s are", moec_dtypes[t].name, moec_dtypes[most].name);
    const moec_json *config = moec_ckpt_config(f->model->ckpt);
    const moec_json *said = moec_json_get(config, "dtype");
    const char *word = moec_json_string(said ? said : moec_json_get(config, "torch_dtype"));
    static const struct { const char *word; moec_dtype dtype; } words[] = {
        {"float32", MOEC_F32}, {"float16", MOEC_F16}, {"bfloat16", MOEC_BF16}};
    for (size_t i = 0; word && i < MOEC_COUNT(words); i++)
        if (strcmp(word, words[i].word) == 0 && (int)words[i].dtype != most)
            note(f, "config.json says %s, the weights are %s", word, moec_dtypes[most].name);
}

/* One number that the config may spell in several ways: they should agree. */
static void note_aliases(facts *f, const char *const *keys)
{
    const moec_json *config = f->model->config;
    const char *first = NULL;
    int64_t value = 0, other;
    for (int i = 0; i < MOEC_KEY_ALIASES && keys[i]; i++) {
        if (!moec_json_int(moec_json_path(config, keys[i]), &other))
            continue;
        if (!first) {
            first = keys[i];
            value = other;
        } else if (other != value) {
            note(f, "config.json disagrees with itself: %s is %lld (used), %s is %lld", first, (long long)value,
                 keys[i], (long long)other);
        }
    }
}

static void note_index(facts *f)
{
    const moec_json *index = moec_ckpt_index(f->model->ckpt);
    int64_t said;
    if (moec_json_int(moec_json_get(moec_json_get(index, "metadata"), "total_size"), &said) &&
        (uint64_t)said != moec_ckpt_bytes(f->model->ckpt))
        note(f, "the index says %lld bytes of tensors, there are %llu", (long long)said,
             (unsigned long long)moec_ckpt_bytes(f->model->ckpt));
}

static moec_status note_unbound(facts *f, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_place *place = NULL;
    bool *used = NULL;
    size_t n = 0;
    const char *first = NULL;
    MOEC_TRY(moec_model_places(&place, f->model, err));
    MOEC_TRY(moec_model_used(&used, f->model, err));
    for (size_t i = 0; i < moec_ckpt_count(f->model->ckpt); i++) {
        if (used[i] || place[i].role != MOEC_ROLE_OTHER || place[i].mtp)
            continue;
        n++;
        first = first ? first : moec_ckpt_at(f->model->ckpt, i)->name;
    }
    if (n > 0)
        note(f, "%zu tensor%s without a part in the forward pass, copied unchanged: %.100s%s", n, tool_s((int64_t)n), first,
             n > 1 ? ", ..." : "");
done:
    moec_free(used);
    moec_free(place);
    return st;
}

static moec_status collect(facts *f, moec_err *err)
{
    const moec_ckpt *c = f->model->ckpt;
    char *path = NULL;
    moec_status st = moec_model_sizes(&f->sizes, f->model, err);
    if (st == MOEC_OK)
        st = moec_path_join(&path, moec_ckpt_dir(c), "tokenizer.json", err);
    if (st != MOEC_OK)
        return st;
    f->tokenizer = moec_path_exists(path);
    moec_free(path);
    f->tokenizer = f->tokenizer || (moec_ckpt_gguf(c) && moec_gguf_find(moec_gguf_front(moec_ckpt_gguf(c)), "tokenizer.ggml.tokens"));
    for (size_t i = 0; i < moec_ckpt_count(c); i++) {
        const moec_tensor *t = moec_ckpt_at(c, i);
        f->dtype_tensors[t->dtype]++;
        f->dtype_bytes[t->dtype] += t->bytes;
    }
    note_shape(f);
    note_dtypes(f);
    note_aliases(f, f->model->family->key_experts);
    note_aliases(f, f->model->family->key_top_k);
    note_aliases(f, f->model->family->key_expert_width);
    note_index(f);
    if (!f->tokenizer)
        note(f, "no tokenizer.json: texts must be given as token ids (.ids files)");
    return note_unbound(f, err);
}

/* --- output ------------------------------------------------------------------------------------------------------- */

static moec_json *sum_json(const char *const *keys, const uint64_t *values, int n)
{
    moec_json *o = moec_json_new_object();
    for (int i = 0; i < n; i++)
        moec_json_set(o, keys[i], moec_json_new_int((int64_t)values[i]));
    return o;
}

static int64_t heads_layers(const moec_model *m)
{
    int64_t n = 0;
    for (int64_t i = 0; i < m->sets; i++)
        n += m->set[i].kind == MOEC_SET_HEADS;
    return n;
}

/* What config.json calls the model: a family goes by several names, and a language model may be a part of more. */
static const char *config_type(const moec_model *m)
{
    const char *type = moec_json_string(moec_json_get(moec_ckpt_config(m->ckpt), "model_type"));
    return type ? type : m->family->model_type;
}

static const char *config_class(const moec_model *m)
{
    const char *name = moec_json_string(moec_json_at(moec_json_get(moec_ckpt_config(m->ckpt), "architectures"), 0));
    return name ? name : m->family->architecture;
}

static moec_json *clients_json(const moec_model *m)
{
    moec_client client[MOEC_VERIFY_CLIENTS];
    int n = moec_clients(client, m);
    moec_json *clients = moec_json_new_object();
    for (int i = 0; i < n; i++) {
        moec_json *one = moec_json_new_object();
        moec_json_set(one, "loads", moec_json_new_bool(client[i].loads));
        moec_json_set(one, "reason", moec_json_new_string(client[i].reason));
        if (client[i].advice[0])
            moec_json_set(one, "advice", moec_json_new_string(client[i].advice));
        moec_json_set(clients, client[i].name, one);
    }
    return clients;
}

static moec_json *to_json(const facts *f)
{
    const moec_dims *d = &f->model->dims;
    moec_json *o = moec_json_new_object(), *dtypes = moec_json_new_object();
    moec_json *notes = moec_json_new_array();
    moec_json_set(o, "model_type", moec_json_new_string(f->model->family->model_type));
    moec_json_set(o, "models", moec_json_new_string(f->model->family->models));
    moec_json_set(o, "config_model_type", moec_json_new_string(config_type(f->model)));
    moec_json_set(o, "architecture", moec_json_new_string(config_class(f->model)));
    const struct { const char *key; int64_t value; } numbers[] = {
        {"layers", d->layers}, {"moe_layers", f->model->moe_layers}, {"experts", d->experts}, {"top_k", d->top_k},
        {"hidden_size", d->hidden}, {"expert_intermediate_size", d->expert_width}, {"vocab_size", d->vocab},
        {"attention_heads", d->heads}, {"key_value_heads", d->kv_heads}, {"head_dim", d->head_dim},
        {"shared_intermediate_size", d->shared_width}, {"dense_intermediate_size", d->dense_width},
        {"groups", d->groups}, {"chosen_groups", d->top_groups}, {"null_experts", d->null_experts},
        {"mtp_layers", f->model->mtp_layers}, {"attention_expert_layers", heads_layers(f->model)}};
    char mixer[200];
    for (size_t i = 0; i < MOEC_COUNT(numbers); i++)
        moec_json_set(o, numbers[i].key, moec_json_new_int(numbers[i].value));
    moec_json_set(o, "mixer", moec_json_new_string(mixer_text(mixer, sizeof mixer, f->model)));
    moec_json_set(o, "expert_weights", moec_json_new_string(weights_name(f->model)));
    moec_json_set(o, "expert_storage", moec_json_new_string(storage_text(f->model)));
    double codes, on_disk;
    if (expert_bits(&codes, &on_disk, f->model, -1)) {
        moec_json *bits = moec_json_new_object(), *layers = moec_json_new_array();
        moec_json_set(bits, "codes", moec_json_new_real(codes));
        moec_json_set(bits, "with_scales", moec_json_new_real(on_disk));
        for (int64_t i = 0; i < f->model->moe_layers; i++) {
            (void)expert_bits(&codes, &on_disk, f->model, f->model->set[i].layer);
            moec_json_push(layers, moec_json_new_real(codes));
        }
        moec_json_set(bits, "layers", layers);
        moec_json_set(o, "expert_bits", bits);
    }
    const uint64_t parameters[] = {f->sizes.total, f->sizes.active, f->sizes.routed};
    const uint64_t bytes[] = {f->sizes.bytes, f->sizes.routed_bytes};
    static const char *const keys[] = {"total", "active", "routed_experts"}, *const byte_keys[] = {"total",
                                                                                                   "routed_experts"};
    moec_json_set(o, "parameters", sum_json(keys, parameters, 3));
    moec_json_set(o, "bytes", sum_json(byte_keys, bytes, 2));
    for (int t = 0; t < MOEC_DTYPE_COUNT; t++)
        if (f->dtype_tensors[t])
            moec_json_set(dtypes, moec_dtypes[t].name, moec_json_new_int((int64_t)f->dtype_tensors[t]));
    moec_json_set(o, "dtypes", dtypes);
    moec_json_set(o, "shards", moec_json_new_int((int64_t)moec_ckpt_shards(f->model->ckpt)));
    moec_json_set(o, "tokenizer", moec_json_new_bool(f->tokenizer));
    moec_json_set(o, "clients", clients_json(f->model));
    for (int i = 0; i < f->n_notes; i++)
        moec_json_push(notes, moec_json_new_string(f->note[i]));
    moec_json_set(o, "notes", notes);
    return o;
}

/* 4712345 -> "4.71 M" */
static const char *count_text(char *buf, size_t cap, uint64_t n)
{
    static const char *const suffix[] = {"", " k", " M", " B", " T"};
    double v = (double)n;
    size_t i = 0;
    for (; v >= 999.5 && i + 1 < MOEC_COUNT(suffix); i++)
        v /= 1000.0;
    snprintf(buf, cap, i == 0 ? "%.0f%s" : v < 9.995 ? "%.2f%s" : v < 99.95 ? "%.1f%s" : "%.0f%s", v, suffix[i]);
    return buf;
}

/* How many experts the shared one is as wide as: configs count them. */
static const char *shared_text(char *buf, size_t cap, const moec_dims *d)
{
    buf[0] = '\0';
    if (d->expert_width > 0 && d->shared_width > d->expert_width && d->shared_width % d->expert_width == 0)
        snprintf(buf, cap, " (as %lld experts)", (long long)(d->shared_width / d->expert_width));
    return buf;
}

static double percent(uint64_t part, uint64_t whole)
{
    return whole ? 100.0 * (double)part / (double)whole : 0.0;
}

static void print_sizes(const facts *f)
{
    const moec_sizes *s = &f->sizes;
    char a[32], b[32], c[32];
    printf("%-14s %s, %s a token uses (%.1f%%), %s in routed experts (%.1f%%)\n", "parameters",
           count_text(a, sizeof a, s->total), count_text(b, sizeof b, s->active), percent(s->active, s->total),
           count_text(c, sizeof c, s->routed), percent(s->routed, s->total));
    printf("%-14s %s, %s in routed experts (%.1f%%)\n", "tensor bytes", moec_size_text(a, sizeof a, s->bytes),
           moec_size_text(b, sizeof b, s->routed_bytes), percent(s->routed_bytes, s->bytes));
    const char *sep = "";
    printf("%-14s ", "dtypes");
    for (int t = 0; t < MOEC_DTYPE_COUNT; t++) {
        if (!f->dtype_tensors[t])
            continue;
        printf("%s%s in %llu tensors (%s)", sep, moec_dtypes[t].name, (unsigned long long)f->dtype_tensors[t],
               moec_size_text(a, sizeof a, f->dtype_bytes[t]));
        sep = ", ";
    }
    printf("\n");
}

/* Experts: how many, of what kind, and how they lie in the files. */
static void print_experts(const moec_model *m)
{
    const moec_dims *d = &m->dims;
    char routing[TOOL_ROUTING], shared[48];
    printf("%-14s %lld a layer, %s%lld chosen for a token\n", "experts", (long long)d->experts,
           d->slots > d->top_k ? "usually " : "", (long long)d->top_k);
    if (heads_layers(m) > 0)
        printf("%-14s the attention of %lld layer%s chooses among %lld more, %lld for a token\n", "",
               (long long)heads_layers(m), tool_s(heads_layers(m)), (long long)d->experts, (long long)d->top_k);
    tool_routing_text(routing, m->family);
    printf("%-14s %s\n", "routing", routing);
    if (d->groups > 1)
        printf("%-14s %lld of %lld experts each, %lld of them chosen first\n", "groups", (long long)d->groups,
               (long long)(d->experts / d->groups), (long long)d->top_groups);
    if (d->shared_width > 0)
        printf("%-14s %lld wide%s, for every token\n", "shared expert", (long long)d->shared_width,
               shared_text(shared, sizeof shared, d));
    printf("%-14s %s\n", "expert storage", storage_text(m));
    double codes, files;
    if (!expert_bits(&codes, &files, m, -1))
        return;
    printf("%-14s %.3f a value, %.3f with scales\n", "expert bits", codes, files);
    for (int64_t i = 0; i < m->moe_layers; i++) {
        (void)expert_bits(&codes, &files, m, m->set[i].layer);
        printf(i % 12 == 0 ? "%-14s %.2f" : "%s %.2f", i > 0 && i % 12 > 0 ? "" : i == 0 ? "of each layer" : "", codes);
        if (i % 12 == 11 || i + 1 == m->moe_layers)
            printf("\n");
    }
}

/* How far prune can go without a token using fewer experts. */
static void print_room(const moec_model *m)
{
    const moec_dims *d = &m->dims;
    int64_t least = d->top_k;
    if (d->experts <= d->top_k)
        return;
    if (d->groups > 1) {
        least += (d->groups - least % d->groups) % d->groups;
        while (least < d->experts && moec_plan_check_groups(m, least, d->top_k, NULL) != MOEC_OK)
            least += d->groups;
        printf("%-14s up to %lld of %lld experts a layer, as many of each group; up to %lld with --groups drop\n", "can go",
               (long long)(d->experts - least), (long long)d->experts, (long long)(d->experts - d->top_k));
        return;
    }
    printf("%-14s up to %lld of %lld experts a layer; %s\n", "can go", (long long)(d->experts - least), (long long)d->experts,
           moec_top_k_may_shrink(m) ? "beyond that a token uses fewer" : "as many as a token uses must stay");
}

static void print_table(const facts *f)
{
    const moec_model *m = f->model;
    const moec_dims *d = &m->dims;
    moec_client client[MOEC_VERIFY_CLIENTS];
    int n_clients = moec_clients(client, m);
    char mixer[200];
    printf("%-14s %s (%s)\n", "family", m->family->model_type, m->family->models);
    printf("%-14s model_type %s, architecture %s\n", "config.json", config_type(m), config_class(m));
    printf("%-14s %lld, %lld of them with experts\n", "layers", (long long)d->layers, (long long)m->moe_layers);
    printf("%-14s %s; %lld heads of %lld", "attention", mixer_text(mixer, sizeof mixer, m), (long long)d->heads,
           (long long)d->head_dim);
    if (d->kv_heads != d->heads)
        printf(", %lld key-value head%s", (long long)d->kv_heads, tool_s(d->kv_heads));
    printf("\n");
    print_experts(m);
    printf("%-14s hidden %lld, expert %lld, vocabulary %lld\n", "widths", (long long)d->hidden, (long long)d->expert_width,
           (long long)d->vocab);
    print_sizes(f);
    printf("%-14s %zu%s\n", "shards", moec_ckpt_shards(m->ckpt), moec_ckpt_is_sharded(m->ckpt) ? " with an index" : "");
    printf("%-14s %s\n", "tokenizer", !f->tokenizer ? "none" : moec_ckpt_gguf(m->ckpt) ? "in the file" : "tokenizer.json");
    print_room(m);
    for (int i = 0; i < n_clients; i++)
        printf("%-14s %-13s %s: %s%s%s\n", i ? "" : "clients", client[i].name, client[i].loads ? "yes" : "no",
               client[i].reason, client[i].advice[0] ? "; but " : "", client[i].advice);
    for (int i = 0; i < f->n_notes; i++)
        printf("%-14s %s\n", i ? "" : "unusual", f->note[i]);
}

static int run(const moec_verb *verb, int argc, char **argv)
{
    inspect_params params;
    moec_opt_list words;
    int code;
    if (!tool_begin(&code, &params, &words, verb, argc, argv))
        return code;
    moec_err err = {MOEC_OK, ""};
    moec_model *model = NULL;
    moec_status st = MOEC_OK;
    static facts f; /* too large for a small stack */
    bool written;
    written = false;
    if (!moec_gguf_is(words.at[0]))
        MOEC_TRY(tool_inspect_written(&written, words.at[0], params.common.json, &err));
    if (written)
        goto done;
    MOEC_TRY(moec_model_open(&model, words.at[0], &err));
    f.model = model;
    MOEC_TRY(collect(&f, &err));
    if (params.common.json)
        MOEC_TRY(tool_print_json(to_json(&f), &err));
    else
        print_table(&f);
done:
    moec_model_close(model);
    return tool_end(st, &err);
}

const moec_verb moec_verb_inspect = {
    .name = "inspect",
    .args = "MODEL [options]",
    .brief = "family, layers, experts, sizes, dtypes, and which programs load it",
    .about = "Says what a model is and what it weighs: its family, layers, experts, parameters (all; those a token uses, "
             "without the embedding table; those in routed experts), bytes, number formats, shards, which programs load it and why, and whatever about "
             "it is unusual. MODEL is a folder with config.json and safetensors, or a GGUF. Only headers are read, no weights.",
    .examples = "moecompress inspect ~/models/Qwen3-30B-A3B\n"
                "moecompress inspect ~/models/Qwen3-30B-A3B --json",
    .opts = rows,
    .min_args = 1,
    .max_args = 1,
    .run = run,
};
