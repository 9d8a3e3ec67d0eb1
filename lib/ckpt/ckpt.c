/* Opens a checkpoint folder: maps its shards, checks the index against them, finds tensors by name. */
#include "ckpt/ckpt.h"

#include "base/file.h"
#include "base/mem.h"
#include "ckpt/shard.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

struct moec_ckpt {
    char *dir, *config_text;
    moec_json *config, *index;
    size_t n_shards, shards_cap;
    moec_shard *shard;
    size_t n;
    moec_tensor *tensor;
    uint32_t *owner;  /* [n] shard of each tensor */
    uint32_t *sorted; /* [n] tensor numbers by name */
    moec_ckpt_parts of; /* gguf NULL: a folder; tensor and file are those above */
};

/* Parsed JSON takes up to fifty times its bytes, so the bounds stay near what real models have: the largest index.json
 * in use is below 20 MB. */
enum { MAX_CONFIG = 8 << 20, MAX_INDEX = 128 << 20, MAX_SHARDS = 65536 };

static moec_status add_shard(moec_ckpt *c, const char *name, moec_err *err)
{
    if (c->n_shards >= MAX_SHARDS)
        return moec_fail(err, MOEC_EFORMAT, "%s: more than %d shards", c->dir, MAX_SHARDS);
    moec_status st = MOEC_GROW(c->shard, c->shards_cap, c->n_shards + 1, err);
    if (st != MOEC_OK)
        return st;
    return moec_shard_open(&c->shard[c->n_shards++], c->dir, name, err); /* moec_ckpt_close releases it in any case */
}

static int by_text(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* The shard files that the index names, once each and sorted; every one must be a plain name in this folder. */
static moec_status index_shards(moec_ckpt *c, moec_json *map, moec_err *err)
{
    moec_status st = MOEC_OK;
    const char **file = NULL, *key;
    size_t n = 0;
    void *it = NULL;
    moec_json *value;
    MOEC_TRY(MOEC_NEW(file, moec_json_len(map), err));
    while (moec_json_each(map, &it, &key, &value)) {
        const char *name = moec_json_string(value);
        if (!name || !moec_path_is_plain(name)) {
            st = moec_fail(err, MOEC_EFORMAT, "%s/model.safetensors.index.json: tensor %.100s: %s", c->dir, key,
                           name ? "its file lies outside the folder" : "its file is not a text");
            goto done;
        }
        file[n++] = name;
    }
    if (n > 1)
        qsort(file, n, sizeof *file, by_text);
    for (size_t i = 0; i < n; i++)
        if (i == 0 || strcmp(file[i], file[i - 1]) != 0)
            MOEC_TRY(add_shard(c, file[i], err));
done:
    moec_free(file);
    return st;
}

static moec_status open_files(moec_ckpt *c, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *single = NULL, *index = NULL;
    MOEC_TRY(moec_path_join(&single, c->dir, "model.safetensors", err));
    MOEC_TRY(moec_path_join(&index, c->dir, "model.safetensors.index.json", err));
    bool has_single = moec_path_exists(single);
    if (moec_path_exists(index)) {
        MOEC_TRY(moec_json_read(&c->index, index, MAX_INDEX, err));
        moec_json *map = moec_json_get(c->index, "weight_map");
        if (moec_json_type(map) != MOEC_JSON_OBJECT || moec_json_len(map) == 0) {
            st = moec_fail(err, MOEC_EFORMAT, "%s: no weight_map", index);
            goto done;
        }
        MOEC_TRY(index_shards(c, map, err));
        for (size_t i = 0; i < c->n_shards && has_single; i++)
            has_single = strcmp(c->shard[i].name, "model.safetensors") != 0;
        if (has_single) /* transformers would load that file, others the index */
            st = moec_fail(err, MOEC_EFORMAT, "%s: model.safetensors is there and model.safetensors.index.json does not name "
                           "it: clients differ in which of the two they load, expected one", c->dir);
    } else if (has_single) {
        MOEC_TRY(add_shard(c, "model.safetensors", err));
    } else {
        st = moec_fail(err, MOEC_EFORMAT, "%s: neither model.safetensors nor model.safetensors.index.json is there",
                       c->dir);
    }
done:
    moec_free(single);
    moec_free(index);
    return st;
}

static _Thread_local const moec_tensor *sort_base; /* qsort has no context argument */

static int by_name(const void *a, const void *b)
{
    return strcmp(sort_base[*(const uint32_t *)a].name, sort_base[*(const uint32_t *)b].name);
}

/* Finds names, and those that are there twice. */
static moec_status sort_names(moec_ckpt *c, moec_err *err)
{
    moec_status st = MOEC_NEW(c->sorted, c->n, err);
    if (st != MOEC_OK)
        return st;
    for (size_t i = 0; i < c->n; i++)
        c->sorted[i] = (uint32_t)i;
    sort_base = c->tensor;
    qsort(c->sorted, c->n, sizeof *c->sorted, by_name);
    for (size_t i = 1; i < c->n; i++) {
        const moec_tensor *t = &c->tensor[c->sorted[i]];
        if (strcmp(t->name, c->tensor[c->sorted[i - 1]].name) == 0)
            return moec_fail(err, MOEC_EFORMAT, "%s: tensor %.200s is in two shards", c->dir, t->name);
    }
    return MOEC_OK;
}

static moec_status collect(moec_ckpt *c, moec_err *err)
{
    moec_status st = MOEC_OK;
    for (size_t s = 0; s < c->n_shards; s++)
        c->n += c->shard[s].ix.n;
    if (c->n == 0 || c->n > UINT32_MAX)
        return moec_fail(err, MOEC_EFORMAT, "%s: %zu tensors", c->dir, c->n);
    MOEC_TRY(MOEC_NEW(c->tensor, c->n, err));
    MOEC_TRY(MOEC_NEW(c->owner, c->n, err));
    size_t at = 0;
    for (size_t s = 0; s < c->n_shards; s++) {
        for (size_t i = 0; i < c->shard[s].ix.n; i++, at++) {
            c->tensor[at] = moec_shard_tensor(&c->shard[s], i);
            c->owner[at] = (uint32_t)s;
        }
    }
    MOEC_TRY(sort_names(c, err));
done:
    return st;
}

static moec_status check_index(const moec_ckpt *c, moec_err *err)
{
    void *it = NULL;
    const char *key;
    moec_json *value, *map = moec_json_get(c->index, "weight_map");
    while (map && moec_json_each(map, &it, &key, &value)) {
        const moec_tensor *t = moec_ckpt_find(c, key);
        const char *file = moec_json_string(value);
        if (!t || strcmp(c->shard[c->owner[t - c->tensor]].name, file) != 0)
            return moec_fail(err, MOEC_EFORMAT, "%s: tensor %.200s is not in %s, where the index says it is", c->dir,
                             key, file);
    }
    return MOEC_OK;
}

/* What people have in place of a checkpoint folder, and what to give instead. */
static moec_status no_config(const char *dir, moec_err *err)
{
    static const struct { const char *name, *advice; } known[] = {
        {"snapshots", "a hub cache; give the folder under snapshots"},
        {"model_index.json", "a diffusers pipeline; give the folder of its text model"},
        {"adapter_config.json", "a LoRA adapter; give the base model, merged with it"},
    };
    for (size_t i = 0; i < MOEC_COUNT(known); i++) {
        char *path;
        moec_status st = moec_path_join(&path, dir, known[i].name, err);
        if (st != MOEC_OK)
            return st;
        const bool there = moec_path_exists(path);
        moec_free(path);
        if (there)
            return moec_fail(err, MOEC_EFORMAT, "%s: no config.json, not a checkpoint folder but %s", dir, known[i].advice);
    }
    char **names = NULL;
    size_t n = 0;
    const moec_status st = moec_dir_list(&names, &n, dir, err);
    if (st != MOEC_OK)
        return st;
    for (size_t i = 0; i < n; i++) {
        const size_t length = strlen(names[i]);
        if (length > 5 && strcmp(names[i] + length - 5, ".gguf") == 0) { /* the first of them, of those in order */
            (void)moec_fail(err, MOEC_EFORMAT, "%s: no config.json, not a checkpoint folder; give the GGUF in it: %s/%s", dir, dir, names[i]);
            moec_names_free(names, n);
            return MOEC_EFORMAT;
        }
    }
    moec_names_free(names, n);
    return moec_fail(err, MOEC_EFORMAT, "%s: no config.json, not a checkpoint folder (a Hugging Face folder with config.json and "
                     "safetensors)", dir);
}

moec_status moec_ckpt_open(moec_ckpt **out, const char *dir, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_ckpt *c = NULL;
    char *path = NULL;
    size_t len;
    *out = NULL;
    if (!moec_path_is_dir(dir))
        return moec_path_exists(dir) ? moec_fail(err, MOEC_EFORMAT, "%s: a file, not a checkpoint folder (of single files "
                                                 "only GGUF is read)", dir)
                                     : moec_fail(err, MOEC_EIO, "%s: there is no such folder", dir);
    MOEC_TRY(MOEC_NEW(c, 1, err));
    MOEC_TRY(moec_copy(&c->dir, dir, strlen(dir), err));
    for (size_t n = strlen(c->dir); n > 1 && c->dir[n - 1] == '/'; n--)
        c->dir[n - 1] = '\0';
    MOEC_TRY(moec_path_join(&path, c->dir, "config.json", err));
    if (!moec_path_exists(path)) {
        st = no_config(c->dir, err);
        goto done;
    }
    MOEC_TRY(moec_file_read(&c->config_text, &len, path, MAX_CONFIG, err));
    MOEC_TRY(moec_json_parse(&c->config, c->config_text, len, path, err));
    if (moec_json_type(c->config) != MOEC_JSON_OBJECT) {
        st = moec_fail(err, MOEC_EFORMAT, "%s: not a JSON object", path);
        goto done;
    }
    MOEC_TRY(open_files(c, err));
    MOEC_TRY(collect(c, err));
    MOEC_TRY(check_index(c, err));
    *out = c;
    c = NULL;
done:
    moec_free(path);
    moec_ckpt_close(c);
    return st;
}

void moec_ckpt_parts_release(moec_ckpt_parts *parts)
{
    for (size_t i = 0; i < parts->n; i++)
        moec_free((char *)(uintptr_t)parts->tensor[i].name);
    moec_free(parts->tensor);
    moec_free(parts->file);
    moec_free(parts->config);
    if (parts->made)
        munmap(parts->made, parts->made_bytes);
    moec_gguf_close(parts->gguf);
    *parts = (moec_ckpt_parts){0};
}

moec_status moec_ckpt_of_gguf(moec_ckpt **out, const char *path, moec_ckpt_parts *parts, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_ckpt *c = NULL;
    *out = NULL;
    MOEC_TRY(MOEC_NEW(c, 1, err));
    c->of = *parts;
    *parts = (moec_ckpt_parts){0};
    c->tensor = c->of.tensor;
    c->owner = c->of.file;
    c->n = c->of.n;
    if (c->n == 0 || c->n > UINT32_MAX) {
        st = moec_fail(err, MOEC_EFORMAT, "%s: %zu tensors", path, c->n);
        goto done;
    }
    MOEC_TRY(moec_copy(&c->dir, path, strlen(path), err));
    MOEC_TRY(moec_copy(&c->config_text, c->of.config, strlen(c->of.config), err));
    MOEC_TRY(moec_json_parse(&c->config, c->config_text, strlen(c->config_text), path, err));
    MOEC_TRY(sort_names(c, err));
    *out = c;
    c = NULL;
done:
    moec_ckpt_close(c);
    moec_ckpt_parts_release(parts);
    return st;
}

const moec_gguf *moec_ckpt_gguf(const moec_ckpt *c)
{
    return c->of.gguf;
}

moec_status moec_ckpt_unchanged(const moec_ckpt *c, moec_err *err)
{
    if (c->of.gguf)
        return moec_gguf_unchanged(c->of.gguf, err);
    for (size_t i = 0; i < c->n_shards; i++) {
        const moec_shard *s = &c->shard[i];
        struct stat now;
        if (fstat(s->fd, &now) != 0)
            return moec_fail_errno(err, errno, s->name);
        if ((size_t)now.st_size != s->size || now.st_mtim.tv_sec != s->changed.tv_sec ||
            now.st_mtim.tv_nsec != s->changed.tv_nsec)
            return moec_fail(err, MOEC_EFORMAT, "%s/%s: was changed while it was being read", c->dir, s->name);
    }
    return MOEC_OK;
}

void moec_ckpt_close(moec_ckpt *c)
{
    if (!c)
        return;
    for (size_t i = 0; i < c->n_shards; i++)
        moec_shard_close(&c->shard[i]);
    moec_free(c->shard);
    moec_free(c->sorted);
    if (c->of.gguf) {
        moec_ckpt_parts_release(&c->of);
    } else {
        moec_free(c->tensor);
        moec_free(c->owner);
    }
    moec_json_free(c->config);
    moec_json_free(c->index);
    moec_free(c->config_text);
    moec_free(c->dir);
    moec_free(c);
}

const char *moec_ckpt_dir(const moec_ckpt *c)
{
    return c->dir;
}

const moec_json *moec_ckpt_config(const moec_ckpt *c)
{
    return c->config;
}

const char *moec_ckpt_config_text(const moec_ckpt *c)
{
    return c->config_text;
}

size_t moec_ckpt_count(const moec_ckpt *c)
{
    return c->n;
}

const moec_tensor *moec_ckpt_at(const moec_ckpt *c, size_t i)
{
    return &c->tensor[i];
}

const moec_tensor *moec_ckpt_find(const moec_ckpt *c, const char *name)
{
    size_t lo = 0, hi = c->n;
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        const moec_tensor *t = &c->tensor[c->sorted[mid]];
        int d = strcmp(name, t->name);
        if (d == 0)
            return t;
        if (d < 0)
            hi = mid;
        else
            lo = mid + 1;
    }
    return NULL;
}

size_t moec_ckpt_shard_of(const moec_ckpt *c, size_t i)
{
    return c->owner[i];
}

uint64_t moec_ckpt_offset(const moec_ckpt *c, size_t i)
{
    return c->of.gguf ? 0 : (uint64_t)((const unsigned char *)c->tensor[i].data - c->shard[c->owner[i]].map);
}

moec_status moec_ckpt_read(void *out, const moec_ckpt *c, const moec_tensor *t, size_t at, size_t n, moec_err *err)
{
    const uintptr_t first = (uintptr_t)c->tensor, it = (uintptr_t)t;
    if (c->of.gguf || it < first || it >= first + c->n * sizeof *t) {
        memcpy(out, (const char *)t->data + at, n);
        return MOEC_OK;
    }
    const size_t i = (size_t)(t - c->tensor);
    const moec_shard *s = &c->shard[c->owner[i]];
    for (size_t done = 0; done < n;) {
        ssize_t got = pread(s->fd, (char *)out + done, n - done, (off_t)(moec_ckpt_offset(c, i) + at + done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return moec_fail_errno(err, errno, s->name);
        if (got == 0)
            return moec_fail(err, MOEC_EIO, "%s: has become shorter", s->name);
        done += (size_t)got;
    }
    return MOEC_OK;
}

size_t moec_ckpt_shards(const moec_ckpt *c)
{
    return c->of.gguf ? moec_gguf_files(c->of.gguf) : c->n_shards;
}

const char *moec_ckpt_shard_name(const moec_ckpt *c, size_t s)
{
    return c->of.gguf ? moec_path_base(moec_gguf_path(c->of.gguf, s)) : c->shard[s].name;
}

int moec_ckpt_shard_fd(const moec_ckpt *c, size_t s)
{
    return c->of.gguf ? -1 : c->shard[s].fd;
}

const char *moec_ckpt_shard_metadata(const moec_ckpt *c, size_t s)
{
    return c->of.gguf ? NULL : c->shard[s].ix.metadata;
}

bool moec_ckpt_is_sharded(const moec_ckpt *c)
{
    return c->index != NULL || (c->of.gguf && moec_gguf_files(c->of.gguf) > 1);
}

const moec_json *moec_ckpt_index(const moec_ckpt *c)
{
    return c->index;
}

uint64_t moec_ckpt_bytes(const moec_ckpt *c)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < c->n; i++)
        sum += c->tensor[i].bytes;
    return sum;
}

void moec_ckpt_drop(const moec_ckpt *c)
{
    for (size_t s = 0; c->of.gguf && s < moec_gguf_files(c->of.gguf); s++)
        moec_gguf_drop(c->of.gguf, s);
    if (c->of.made)
        moec_pages_drop(c->of.made, c->of.made_bytes);
    for (size_t s = 0; s < c->n_shards; s++)
        moec_pages_drop(c->shard[s].map, c->shard[s].size);
}

moec_status moec_ckpt_fingerprint(moec_digest *out, const moec_ckpt *c, moec_err *err)
{
    moec_hash *h;
    moec_status st = moec_hash_new(&h, err);
    if (st != MOEC_OK)
        return st;
    for (size_t i = 0; i < c->n; i++) {
        const moec_tensor *t = &c->tensor[c->sorted[i]];
        const unsigned char *bytes = t->data;
        moec_tensor_hash(h, t);
        size_t n = t->bytes < 64 ? t->bytes : 64;
        moec_hash_add(h, bytes, n);
        moec_hash_add(h, bytes + (t->bytes - n) / 2, n);
        moec_hash_add(h, bytes + (t->bytes - n), n);
        const uint32_t s = c->owner[c->sorted[i]];
        if (c->of.gguf)
            moec_gguf_drop(c->of.gguf, s);
        else
            moec_pages_drop(c->shard[s].map, c->shard[s].size);
    }
    *out = moec_hash_digest(h);
    moec_hash_free(h);
    return MOEC_OK;
}
