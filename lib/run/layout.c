/* Turns model and plan into the list of files that the writer carries out. */
#include "run/layout.h"

#include "base/file.h"
#include "base/mem.h"
#include "run/extra.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct builder {
    const moec_model *m;
    const moec_plan *p;
    const moec_ckpt *c;
    const moec_override *weights; /* computed anew; NULL: only their sizes matter */
    moec_layout *l;
    moec_forms forms;
    bool *used;         /* by the forward pass */
    char **shard_name;  /* [2 shards] names in the output of what a shard becomes and, where experts get shards of their own, of that
                           of its experts; NULL: is empty */
    int64_t more_values; /* parameters of the output minus those of the source */
    bool same;          /* every tensor is the source's under its own name */
} builder;

/* --- shards ---------------------------------------------------------------------------------------------------------- */

/* "PREFIX-00002-of-00003.safetensors": length of PREFIX and width of the number; 0 when the name is of another form. */
static size_t split_name(const char *name, int *width)
{
    const char *of = strstr(name, "-of-");
    while (of && strstr(of + 1, "-of-"))
        of = strstr(of + 1, "-of-");
    if (!of || strcmp(of + 4 + strspn(of + 4, "0123456789"), ".safetensors") != 0)
        return 0;
    const char *digits = of;
    while (digits > name && digits[-1] >= '0' && digits[-1] <= '9')
        digits--;
    *width = (int)(of - digits);
    return digits > name && digits[-1] == '-' && *width > 0 && *width < 20 ? (size_t)(digits - 1 - name) : 0;
}

/* Are all shards numbered parts under one prefix? Only then can they be renumbered. */
static bool numbered(const moec_ckpt *c, size_t *prefix, int *width)
{
    *prefix = split_name(moec_ckpt_shard_name(c, 0), width);
    for (size_t s = 1; s < moec_ckpt_shards(c) && *prefix > 0; s++) {
        int w;
        if (split_name(moec_ckpt_shard_name(c, s), &w) != *prefix || w != *width ||
            strncmp(moec_ckpt_shard_name(c, s), moec_ckpt_shard_name(c, 0), *prefix) != 0)
            *prefix = 0;
    }
    return *prefix > 0;
}

/* Number of the output's shard that tensor i goes to. */
static size_t shard_of(const builder *b, size_t i)
{
    const moec_place *p = &b->forms.place[i];
    const bool expert = (p->role == MOEC_ROLE_EXPERT || p->role == MOEC_ROLE_STACK) && p->weights;
    return 2 * moec_ckpt_shard_of(b->c, i) + (b->p->expert_shards && expert);
}

/* "PREFIX-experts-00002-of-00003.safetensors", "NAME-experts.safetensors", "NAME-others.safetensors": a file of a plain name beside an
 * index would be taken for all of the model. */
static moec_status name_part(char **out, const char *name, bool experts, moec_err *err)
{
    static const char tail[] = ".safetensors";
    int width;
    const size_t prefix = split_name(name, &width), len = strlen(name), end = sizeof tail - 1;
    if (prefix > 0)
        return experts ? moec_format(out, err, "%.*s-experts%s", (int)prefix, name, name + prefix) : moec_copy(out, name, len, err);
    const size_t stem = len > end && strcmp(name + len - end, tail) == 0 ? len - end : len;
    return moec_format(out, err, "%.*s-%s%s", (int)stem, name, experts ? "experts" : "others", tail);
}

static moec_status name_shards(builder *b, moec_err *err)
{
    moec_status st = MOEC_OK;
    const size_t n = moec_ckpt_shards(b->c);
    size_t prefix = 0, live = 0, next[2] = {1, 1}, of[2] = {0, 0};
    int width = 0;
    bool *used = NULL;
    char *name = NULL;
    MOEC_TRY(MOEC_NEW(used, 2 * n, err));
    for (size_t i = 0; i < moec_ckpt_count(b->c); i++)
        if (!moec_plan_fate(b->p, b->m, &b->forms, i).dropped)
            used[shard_of(b, i)] = true;
    for (size_t k = 0; k < b->forms.n_extra; k++)
        used[shard_of(b, b->forms.extra[k].anchor)] = true;
    for (size_t s = 0; s < 2 * n; s++) {
        live += s % 2 == 0 ? used[s] || used[s + 1] : 0;
        of[s % 2] += used[s];
    }
    const bool renumber = (live < n || b->p->expert_shards) && numbered(b->c, &prefix, &width);
    for (size_t s = 0; s < 2 * n; s++) {
        const char *was = moec_ckpt_shard_name(b->c, s / 2);
        if (!used[s])
            continue;
        if (renumber)
            MOEC_TRY(moec_format(&name, err, "%.*s-%0*zu-of-%0*zu.safetensors", (int)prefix, was, width, next[s % 2]++, width, of[s % 2]));
        else
            MOEC_TRY(moec_copy(&name, was, strlen(was), err));
        if (b->p->expert_shards) {
            MOEC_TRY(name_part(&b->shard_name[s], name, s % 2 == 1, err));
            moec_free(name);
        } else {
            b->shard_name[s] = name;
        }
        name = NULL;
    }
done:
    moec_free(name);
    moec_free(used);
    return st;
}

/* Bytes [at, at + n) of tensor i as it is before the keep lists. */
static moec_status add_bytes(builder *b, size_t i, uint64_t at, uint64_t n, moec_err *err)
{
    moec_cast *c = &b->forms.cast[i];
    b->l->tensor_bytes += n;
    if (c->made)
        return moec_out_made(b->l->files, moec_cast_make, c, at, n, err);
    return moec_out_bytes(b->l->files, moec_ckpt_shard_fd(b->c, moec_ckpt_shard_of(b->c, i)),
                          moec_ckpt_offset(b->c, i) + at, n, err);
}

static moec_status add_dead(builder *b, size_t i, uint64_t n, moec_err *err)
{
    unsigned char value[8];
    size_t size = moec_dead_bytes(value, b->forms.cast[i].dtype, b->forms.dead[i]);
    b->l->tensor_bytes += n;
    b->l->dead_bytes += n;
    return moec_out_fill(b->l->files, value, size, n, err);
}

/* The tensors of dead experts have the form of a kept one's, behind which they stand. */
static moec_status add_dead_experts(builder *b, size_t i, moec_fate f, moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_cast *c = &b->forms.cast[i];
    char *name = NULL;
    for (int64_t k = 0; k < f.dead; k++) {
        MOEC_TRY(moec_fate_name(&name, b->m, &b->forms, i, f.first_dead + k, err));
        MOEC_TRY(moec_out_tensor(b->l->files, name, c->dtype, c->rank, c->dim, err));
        MOEC_TRY(add_dead(b, i, c->bytes, err));
        b->l->tensors++;
        moec_free(name);
        name = NULL;
    }
done:
    moec_free(name);
    return st;
}

/* Of a tensor of the output; at most what the source has. */
static uint64_t bytes_of(const moec_cast *c, const int64_t *dim)
{
    uint64_t n = (uint64_t)moec_dtypes[c->dtype].bytes;
    for (int k = 0; k < c->rank; k++)
        n *= (uint64_t)dim[k];
    return n;
}

/* A tensor that is computed anew: all its bytes, dead experts' included, are those of one among b->weights. */
static moec_status add_rewritten(builder *b, const char *name, const moec_cast *c, const int64_t *dim, moec_err *err)
{
    uint64_t n = bytes_of(c, dim), at;
    int fd;
    b->l->tensor_bytes += n;
    if (!b->weights)
        return moec_out_fill(b->l->files, "", 1, n, err);
    const moec_tensor *t;
    moec_status st = moec_override_get(&t, b->weights, name, c->dtype, c->rank, dim, err);
    if (st != MOEC_OK)
        return st;
    moec_override_place(&fd, &at, b->weights, t);
    return moec_out_bytes(b->l->files, fd, at, n, err);
}

/* The data of a stack, part for part. */
static moec_status add_parts(builder *b, size_t i, moec_fate f, const int64_t *dim, moec_err *err)
{
    moec_status st = MOEC_OK;
    const uint64_t all = bytes_of(&b->forms.cast[i], dim);
    for (uint64_t at = 0, from, n; st == MOEC_OK && at < all; at += n)
        st = moec_fate_source(&from, &n, &b->forms, i, f, at) ? add_bytes(b, i, from, n, err) : add_dead(b, i, n, err);
    return st;
}

static moec_status add_tensor(builder *b, size_t i, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *name = NULL;
    const moec_tensor *t = moec_ckpt_at(b->c, i);
    const moec_cast *c = &b->forms.cast[i];
    const moec_fate f = moec_plan_fate(b->p, b->m, &b->forms, i);
    const uint64_t before = b->l->tensor_bytes;
    int64_t dim[MOEC_MAX_RANK];
    b->more_values -= (int64_t)(t->bytes / (uint64_t)moec_dtypes[t->dtype].bytes);
    b->same = b->same && !f.dropped && !c->made && !f.parts && f.dead == 0 && !f.rewritten;
    if (f.dropped)
        return MOEC_OK;
    MOEC_TRY(moec_fate_name(&name, b->m, &b->forms, i, f.number, err));
    moec_fate_shape(dim, b->p, b->m, &b->forms, i, f);
    MOEC_TRY(moec_out_tensor(b->l->files, name, c->dtype, c->rank, dim, err));
    b->l->tensors++;
    if (f.rewritten) {
        MOEC_TRY(add_rewritten(b, name, c, dim, err));
        if (f.number >= 0)
            MOEC_TRY(add_dead_experts(b, i, f, err));
    } else if (f.parts) {
        MOEC_TRY(add_parts(b, i, f, dim, err));
    } else {
        MOEC_TRY(add_bytes(b, i, 0, c->bytes, err));
        MOEC_TRY(add_dead_experts(b, i, f, err));
    }
    b->more_values += (int64_t)((b->l->tensor_bytes - before) / (uint64_t)moec_dtypes[c->dtype].bytes);
    if (b->forms.place[i].role == MOEC_ROLE_OTHER && !b->forms.place[i].mtp && !b->used[i] && strstr(t->name, ".experts."))
        b->l->loose++;
done:
    moec_free(name);
    return st;
}

/* What stands in the place of tensor i and its like. */
static moec_status add_extra(builder *b, size_t i, moec_err *err)
{
    moec_status st = MOEC_OK;
    size_t n;
    const moec_extra *x = moec_forms_extra(&n, &b->forms, i);
    for (size_t k = 0; st == MOEC_OK && k < n; k++) {
        const moec_cast *c = &x[k].form;
        st = moec_out_tensor(b->l->files, x[k].name, c->dtype, c->rank, c->dim, err);
        if (st == MOEC_OK)
            st = add_rewritten(b, x[k].key, c, c->dim, err);
        b->l->tensors++;
        b->more_values += (int64_t)(c->bytes / (uint64_t)moec_dtypes[c->dtype].bytes);
    }
    return st;
}

/* Shard by shard of the source; of each first what is in the shard of its name, then, where they are apart, its experts. */
static moec_status add_shards(builder *b, moec_err *err)
{
    moec_status st = MOEC_OK;
    const size_t n = moec_ckpt_count(b->c);
    for (size_t first = 0, end; first < n; first = end) {
        const size_t s = moec_ckpt_shard_of(b->c, first);
        for (end = first; end < n && moec_ckpt_shard_of(b->c, end) == s;)
            end++;
        for (size_t part = 2 * s; part < 2 * s + 2; part++) {
            if (b->shard_name[part])
                MOEC_TRY(moec_out_shard(b->l->files, b->shard_name[part], moec_ckpt_shard_metadata(b->c, s), err));
            for (size_t i = first; i < end; i++)
                if (shard_of(b, i) == part) {
                    MOEC_TRY(add_tensor(b, i, err));
                    MOEC_TRY(add_extra(b, i, err));
                }
        }
    }
done:
    return st;
}

/* --- the index ------------------------------------------------------------------------------------------------------- */

static moec_status map_name(moec_json *map, const builder *b, size_t i, int64_t number, moec_err *err)
{
    char *name;
    moec_status st = moec_fate_name(&name, b->m, &b->forms, i, number, err);
    if (st == MOEC_OK)
        moec_json_set(map, name, moec_json_new_string(b->shard_name[shard_of(b, i)]));
    moec_free(name);
    return st;
}

static moec_status map_tensor(moec_json *map, const builder *b, size_t i, moec_err *err)
{
    const moec_fate f = moec_plan_fate(b->p, b->m, &b->forms, i);
    moec_status st = f.dropped ? MOEC_OK : map_name(map, b, i, f.number, err);
    for (int64_t k = 0; st == MOEC_OK && k < f.dead && f.number >= 0; k++)
        st = map_name(map, b, i, f.first_dead + k, err);
    size_t n;
    const moec_extra *x = moec_forms_extra(&n, &b->forms, i);
    for (size_t k = 0; k < n; k++)
        moec_json_set(map, x[k].name, moec_json_new_string(b->shard_name[shard_of(b, i)]));
    return st;
}

/* In the order of the source's; behind them what its shards hold and it does not list. */
static moec_status index_map(moec_json **out, const builder *b, moec_json *source, moec_err *err)
{
    moec_status st = MOEC_OK;
    void *it = NULL;
    const char *key;
    moec_json *value, *map = moec_json_new_object();
    while (moec_json_each(source, &it, &key, &value))
        MOEC_TRY(map_tensor(map, b, (size_t)(moec_ckpt_find(b->c, key) - moec_ckpt_at(b->c, 0)), err));
    for (size_t i = 0; i < moec_ckpt_count(b->c); i++)
        if (!moec_json_get(source, moec_ckpt_at(b->c, i)->name))
            MOEC_TRY(map_tensor(map, b, i, err));
    *out = map;
    map = NULL;
done:
    moec_json_free(map);
    return st;
}

/* The source's index, its own bytes, when it is right for the output too. */
static moec_status copy_index(bool *copied, builder *b, const char *path, moec_err *err)
{
    int64_t total = -1;
    *copied = b->same && !b->p->expert_shards && moec_json_len(moec_json_get(moec_ckpt_index(b->c), "weight_map")) == moec_ckpt_count(b->c) &&
              moec_json_int(moec_json_get(moec_json_get(moec_ckpt_index(b->c), "metadata"), "total_size"), &total) &&
              (uint64_t)total == b->l->tensor_bytes;
    return *copied ? moec_out_copy(b->l->files, MOEC_INDEX_NAME, path, err) : MOEC_OK;
}

static moec_status add_index(builder *b, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_json *index = NULL, *map = NULL;
    char *text = NULL, *line = NULL, *path = NULL;
    int64_t parameters;
    bool copied;
    if (!moec_ckpt_is_sharded(b->c) && !b->p->expert_shards)
        return MOEC_OK;
    MOEC_TRY(moec_path_join(&path, moec_ckpt_dir(b->c), MOEC_INDEX_NAME, err));
    MOEC_TRY(copy_index(&copied, b, path, err));
    if (copied)
        goto done;
    index = moec_ckpt_is_sharded(b->c) ? moec_json_clone(moec_ckpt_index(b->c)) : moec_json_new_object();
    MOEC_TRY(index_map(&map, b, moec_json_get(index, "weight_map"), err));
    moec_json_set(index, "weight_map", map);
    if (moec_json_type(moec_json_get(index, "metadata")) != MOEC_JSON_OBJECT)
        moec_json_set(index, "metadata", moec_json_new_object());
    moec_json *metadata = moec_json_get(index, "metadata");
    moec_json_set(metadata, "total_size", moec_json_new_int((int64_t)b->l->tensor_bytes));
    if (moec_json_int(moec_json_get(metadata, "total_parameters"), &parameters))
        moec_json_set(metadata, "total_parameters", moec_json_new_int(parameters + b->more_values));
    MOEC_TRY(moec_json_dump(&text, index, 2, err));
    MOEC_TRY(moec_format(&line, err, "%s\n", text));
    MOEC_TRY(moec_out_text(b->l->files, MOEC_INDEX_NAME, line, strlen(line), err));
done:
    moec_free(path);
    moec_free(line);
    moec_free(text);
    moec_json_free(index);
    return st;
}

/* --- all of it ------------------------------------------------------------------------------------------------------- */

static moec_status add_side(builder *b, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *path = NULL, *config = NULL;
    MOEC_TRY(moec_config_edited(&config, b->m, b->p, err));
    MOEC_TRY(moec_out_text(b->l->files, "config.json", config, strlen(config), err));
    if (moec_plan_brings_code(b->p))
        MOEC_TRY(moec_out_text(b->l->files, MOEC_MODELING_NAME, moec__modeling_text, moec__modeling_bytes, err));
    MOEC_TRY(moec_side_scan(&b->l->side, b->c, b->p, err));
    for (size_t i = 0; i < b->l->side.n; i++) {
        const moec_side *s = &b->l->side.at[i];
        if (s->kind != MOEC_SIDE_COPY)
            continue;
        MOEC_TRY(moec_path_join(&path, moec_ckpt_dir(b->c), s->name, err));
        MOEC_TRY(moec_out_copy(b->l->files, s->name, path, err));
        moec_free(path);
        path = NULL;
    }
done:
    moec_free(config);
    moec_free(path);
    return st;
}

moec_status moec_layout_build(moec_layout *out, const moec_model *m, const moec_plan *p, const moec_override *weights,
                              moec_err *err)
{
    moec_status st = MOEC_OK;
    builder b = {.m = m, .p = p, .c = m->ckpt, .weights = weights, .l = out, .same = true};
    *out = (moec_layout){0};
    MOEC_TRY(moec_out_new(&out->files, err));
    MOEC_TRY(moec_forms_new(&b.forms, m, p, err));
    MOEC_TRY(moec_model_used(&b.used, m, err));
    if (moec_ckpt_gguf(b.c))
        MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "%s: a GGUF is read but not rewritten; make a folder of it first: moecompress convert",
                           moec_ckpt_dir(b.c)));
    MOEC_TRY(MOEC_NEW(b.shard_name, 2 * moec_ckpt_shards(b.c), err));
    MOEC_TRY(name_shards(&b, err));
    MOEC_TRY(add_shards(&b, err));
    MOEC_TRY(add_index(&b, err));
    MOEC_TRY(add_side(&b, err));
    MOEC_TRY(moec_out_close(out->files, err));
done:
    moec_names_free(b.shard_name, b.shard_name ? 2 * moec_ckpt_shards(b.c) : 0);
    moec_free(b.used);
    out->forms = b.forms; /* the list of files borrows its casts */
    if (st != MOEC_OK)
        moec_layout_release(out);
    return st;
}

void moec_layout_release(moec_layout *l)
{
    moec_out_free(l->files);
    moec_side_release(&l->side);
    moec_forms_release(&l->forms);
    *l = (moec_layout){0};
}
