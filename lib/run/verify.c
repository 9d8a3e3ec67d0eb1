/* See verify.h. Each check adds its problems and the next one goes on, as far as what it needs is there. */
#include "run/verify.h"

#include "base/file.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/par.h"
#include "run/expect.h"
#include "run/layout.h"
#include "run/verify_codes.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum { PIECE = 1 << 20, MAX_MANIFEST = 1 << 30 }; /* a piece is compared and hashed while it is in the cache */

typedef struct verifier {
    moec_verify_report *r;
    const char *dir;
    const moec_verify_options *opt;
    moec_model *m;         /* NULL: only transformers runs it (factors, a map) */
    moec_ckpt *ckpt, *own; /* own: where there is no model to close it */
    moec_json *manifest;
    moec_plan *plan;
    moec_digest source; /* fingerprint */
    bool plan_fits;     /* the plan is one of the source */
} verifier;

static void problem(moec_verify_report *r, const char *fmt, ...) MOEC_PRINTF(2, 3);
static void problem(moec_verify_report *r, const char *fmt, ...)
{
    if (r->problems < MOEC_VERIFY_SHOWN) {
        va_list ap;
        va_start(ap, fmt);
        vsnprintf(r->problem[r->problems], sizeof r->problem[0], fmt, ap);
        va_end(ap);
    }
    r->problems++;
}

/* True when the status says that the folder is wrong, not that this machine is in trouble. */
static bool is_finding(moec_status st)
{
    return st == MOEC_EFORMAT || st == MOEC_ESHAPE || st == MOEC_EIO || st == MOEC_EINVAL;
}

/* A failed call becomes a problem where it is one. */
static moec_status note(const verifier *v, moec_status st, moec_err *err)
{
    moec_err *e = err;
    if (!is_finding(st))
        return st;
    problem(v->r, "%s", e->text);
    *e = (moec_err){MOEC_OK, ""};
    return MOEC_OK;
}

/* --- manifest -------------------------------------------------------------------------------------------------------- */

static moec_status read_manifest(verifier *v, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *path = NULL;
    MOEC_TRY(moec_path_join(&path, v->dir, MOEC_MANIFEST, err));
    if (!moec_path_exists(path)) {
        problem(v->r, "%s is missing: nothing says what this folder was made from", MOEC_MANIFEST);
        goto done;
    }
    MOEC_TRY(note(v, moec_json_read(&v->manifest, path, MAX_MANIFEST, err), err));
    v->r->has_manifest = v->manifest != NULL;
    if (v->manifest)
        MOEC_TRY(note(v, moec_plan_from_json(&v->plan, moec_json_get(v->manifest, "plan"), MOEC_MANIFEST, err), err));
done:
    moec_free(path);
    return st;
}

static const char *manifest_text(const verifier *v, const char *object, const char *key)
{
    const char *s = moec_json_string(moec_json_get(moec_json_get(v->manifest, object), key));
    return s ? s : "missing";
}

static moec_status check_fingerprints(verifier *v, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_digest mine;
    if (v->opt->source && v->opt->source_fingerprint)
        snprintf(v->source.hex, sizeof v->source.hex, "%s", v->opt->source_fingerprint);
    else if (v->opt->source)
        st = moec_ckpt_fingerprint(&v->source, v->opt->source->ckpt, err);
    if (st == MOEC_OK)
        st = moec_ckpt_fingerprint(&mine, v->ckpt, err);
    if (st != MOEC_OK || !v->manifest)
        return st;
    if (strcmp(mine.hex, manifest_text(v, "output", "fingerprint")) != 0)
        problem(v->r, "fingerprint of the tensors is %s, %s says %s", mine.hex, MOEC_MANIFEST,
                manifest_text(v, "output", "fingerprint"));
    if (v->opt->source && strcmp(v->source.hex, manifest_text(v, "source", "fingerprint")) != 0)
        problem(v->r, "%s is not the source: its fingerprint is %s, %s says %s", moec_ckpt_dir(v->opt->source->ckpt),
                v->source.hex, MOEC_MANIFEST, manifest_text(v, "source", "fingerprint"));
    return st;
}

/* --- files ----------------------------------------------------------------------------------------------------------- */

static bool is_shard(const moec_ckpt *c, const char *name)
{
    for (size_t i = 0; i < moec_ckpt_shards(c); i++)
        if (strcmp(name, moec_ckpt_shard_name(c, i)) == 0)
            return true;
    return false;
}

/* Size and hash of a file against its line in the manifest; shards are hashed with their data. */
static void check_length(const verifier *v, const char *name, const moec_json *line, uint64_t have)
{
    int64_t want = -1;
    if (!moec_json_int(moec_json_get(line, "bytes"), &want) || (uint64_t)want != have)
        problem(v->r, "%s: has %llu bytes, %s says %lld", name, (unsigned long long)have, MOEC_MANIFEST, (long long)want);
}

static moec_status check_file(const verifier *v, const char *name, const moec_json *line, moec_err *err)
{
    moec_status st = MOEC_OK;
    char *path = NULL;
    moec_digest hash;
    uint64_t bytes;
    const char *want = moec_json_string(moec_json_get(line, "xxh128"));
    if (is_shard(v->ckpt, name))
        return MOEC_OK;
    MOEC_TRY(moec_path_join(&path, v->dir, name, err));
    if (!moec_path_exists(path)) {
        problem(v->r, "%s is missing", name);
        goto done;
    }
    st = moec_file_digest(&hash, &bytes, path, err);
    if (st == MOEC_OK && (!want || strcmp(want, hash.hex) != 0))
        problem(v->r, "%s: its hash is %s, %s says %s", name, hash.hex, MOEC_MANIFEST, want ? want : "none");
    else if (st == MOEC_OK)
        check_length(v, name, line, bytes);
    MOEC_TRY(note(v, st, err));
done:
    moec_free(path);
    return st;
}

static moec_status check_files(const verifier *v, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_json *files = moec_json_get(v->manifest, "files"), *line;
    char **names = NULL;
    size_t n = 0;
    void *it = NULL;
    const char *name;
    MOEC_TRY(moec_dir_list(&names, &n, v->dir, err));
    v->r->files = n;
    for (size_t i = 0; i < n; i++) {
        bool mark = strcmp(names[i], MOEC_PARTIAL_MARK) == 0;
        v->r->files -= mark;
        if (v->manifest && !moec_json_get(files, names[i]) && strcmp(names[i], MOEC_MANIFEST) != 0 &&
            !(mark && v->opt->unfinished))
            problem(v->r, "%s is a stray file: %s does not list it", names[i], MOEC_MANIFEST);
    }
    while (files && moec_json_each(files, &it, &name, &line)) {
        if (moec_path_is_plain(name))
            MOEC_TRY(check_file(v, name, line, err));
        else
            problem(v->r, "%s lists %.80s, which is no plain file name", MOEC_MANIFEST, name);
    }
    for (size_t s = 0; v->manifest && s < moec_ckpt_shards(v->ckpt); s++)
        if (!moec_json_get(files, moec_ckpt_shard_name(v->ckpt, s)))
            problem(v->r, "%s is not listed in %s", moec_ckpt_shard_name(v->ckpt, s), MOEC_MANIFEST);
done:
    moec_names_free(names, n);
    return st;
}

/* Every file of the source is in the output with the same bytes, or was written anew, or is listed as left out. */
static moec_status check_side(const verifier *v, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_side_list side = {0};
    char *from = NULL;
    MOEC_TRY(moec_side_scan(&side, v->opt->source->ckpt, v->plan, err));
    for (size_t i = 0; i < side.n; i++) {
        const moec_side *s = &side.at[i];
        moec_digest hash;
        uint64_t bytes;
        const char *have =
            moec_json_string(moec_json_get(moec_json_get(moec_json_get(v->manifest, "files"), s->name), "xxh128"));
        if (s->kind == MOEC_SIDE_LEAVE && !moec_json_get(moec_json_get(v->manifest, "left_out"), s->name))
            problem(v->r, "%s of the source is neither there nor listed as left out", s->name);
        if (s->kind != MOEC_SIDE_COPY)
            continue;
        MOEC_TRY(moec_path_join(&from, moec_ckpt_dir(v->opt->source->ckpt), s->name, err));
        st = moec_file_digest(&hash, &bytes, from, err);
        if (st == MOEC_OK && (!have || strcmp(have, hash.hex) != 0)) /* check_file held `have` against the bytes */
            problem(v->r, "%s: %s", s->name, have ? "differs from the source's" : "is missing, the source has it");
        MOEC_TRY(note(v, st, err));
        moec_free(from);
        from = NULL;
    }
done:
    moec_free(from);
    moec_side_release(&side);
    return st;
}

/* --- numbers --------------------------------------------------------------------------------------------------------- */

static void check_index(const verifier *v)
{
    const moec_json *index = moec_ckpt_index(v->ckpt);
    int64_t total = -1;
    if (!index)
        return;
    size_t listed = moec_json_len(moec_json_get(index, "weight_map")), there = moec_ckpt_count(v->ckpt);
    if (listed != there) /* opening made sure that each listed one is where the index says */
        problem(v->r, "%s lists %zu tensors, the shards hold %zu", MOEC_INDEX_NAME, listed, there);
    if (!moec_json_int(moec_json_get(moec_json_get(index, "metadata"), "total_size"), &total) ||
        (uint64_t)total != moec_ckpt_bytes(v->ckpt))
        problem(v->r, "%s: total_size is %lld, the tensors have %llu bytes", MOEC_INDEX_NAME, (long long)total,
                (unsigned long long)moec_ckpt_bytes(v->ckpt));
}

/* Number in the output of a set's layer, -1: it is dropped. Of a prefix of their own, MTP layers keep theirs. */
static int64_t set_number(const moec_plan *p, const moec_model *m, int64_t i)
{
    const moec_plan_layer *l = &p->layer[i];
    return l->kind == MOEC_SET_MTP && m->family->mtp_layer ? l->layer : moec_plan_layer_number(p, l->layer);
}

/* Sets [from, to) of a plan in layers that stay. */
static int64_t sets_left(const moec_plan *p, const moec_model *m, int64_t from, int64_t to)
{
    int64_t n = 0;
    for (int64_t i = from; i < to; i++)
        n += set_number(p, m, i) >= 0;
    return n;
}

/* Attention experts and MTP layers are there as the plan says. */
static void check_others(const verifier *v)
{
    const moec_plan *p = v->plan;
    const moec_model *m = v->m;
    int64_t count;
    bool same = m->sets - m->moe_layers == sets_left(p, m, p->n_layers, p->n_sets);
    for (int64_t i = p->n_layers, at = m->moe_layers; same && i < p->n_sets; i++) {
        const int64_t number = set_number(p, m, i);
        if (number < 0)
            continue;
        same = m->set[at].kind == p->layer[i].kind && m->set[at].layer == number;
        at++;
    }
    if (!same)
        problem(v->r, "attention experts or multi-token-prediction layers are not those of the plan");
    if (p->mtp == MOEC_PLAN_MTP_DROP && m->key_mtp && moec_json_int(moec_json_path(m->config, m->key_mtp), &count) &&
        count != 0)
        problem(v->r, "config.json: %s is %lld, but these layers were left out", m->key_mtp, (long long)count);
}

/* What config.json says against the plan. */
static void check_dims(const verifier *v)
{
    const moec_plan *p = v->plan;
    const moec_dims *d = &v->m->dims;
    if (d->experts != moec_plan_experts(p) || d->top_k != p->new_top_k)
        problem(v->r, "config.json: %lld experts and top-k %lld, the plan says %lld and %lld", (long long)d->experts,
                (long long)d->top_k, (long long)moec_plan_experts(p), (long long)p->new_top_k);
    const int64_t left = sets_left(p, v->m, 0, p->n_layers);
    if (v->m->moe_layers != left)
        problem(v->r, "%lld layers have experts, the plan has %lld", (long long)v->m->moe_layers,
                (long long)left);
    if (p->width > 0 && d->expert_width != p->width)
        problem(v->r, "config.json: experts have %lld neurons, the plan says %lld", (long long)d->expert_width,
                (long long)p->width);
    if (p->drop_groups && d->groups > 1)
        problem(v->r, "config.json: %lld groups of experts, the plan gives them up", (long long)d->groups);
    check_others(v);
}

static moec_status check_numbers(const verifier *v, moec_err *err)
{
    const moec_plan *p = v->plan;
    if (!p)
        return MOEC_OK;
    if (v->m)
        check_dims(v);
    const bool factors = moec_json_get(moec_ckpt_config(v->ckpt), MOEC_CONFIG_FACTORS) != NULL,
               mapped = moec_json_get(moec_ckpt_config(v->ckpt), MOEC_CONFIG_MAP) != NULL;
    if (p->factor.kept != factors || p->mapped != mapped)
        problem(v->r, "config.json and the plan do not agree on whether %s",
                p->factor.kept != factors ? "the experts are factors" : "rows of the router share experts");
    if (!v->opt->source || !v->plan_fits)
        return MOEC_OK;
    char *want = NULL;
    moec_status st = moec_config_edited(&want, v->opt->source, p, err);
    if (st == MOEC_OK && strcmp(want, moec_ckpt_config_text(v->ckpt)) != 0)
        problem(v->r, "config.json is not the source's with the new numbers");
    moec_free(want);
    if (moec_ckpt_is_sharded(v->ckpt) != (moec_ckpt_is_sharded(v->opt->source->ckpt) || p->expert_shards))
        problem(v->r, "the source is %s, the output is not", moec_ckpt_is_sharded(v->ckpt) ? "one file" : "sharded");
    return st;
}

/* --- data ------------------------------------------------------------------------------------------------------------ */

typedef struct piece {
    size_t s;
    uint64_t lo, hi;
} piece;

typedef struct data_pass {
    const verifier *v;
    moec_expect *x;  /* NULL: hash alone */
    const unsigned char **file; /* [shards] mapped by the checkpoint */
    uint64_t *size;
    piece *piece;
    size_t n;
    moec_err *found; /* [workers] what the worker's present piece has wrong */
    moec_hash *hash; /* of the shard that is being gone through */
    moec_progress progress;
} data_pass;

static moec_status compare_piece(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    data_pass *d = ctx;
    moec_err *found = &d->found[worker];
    *found = (moec_err){MOEC_OK, ""};
    moec_status st = moec_interrupted(err);
    for (int64_t i = lo; st == MOEC_OK && d->x && i < hi; i++) {
        const piece *p = &d->piece[i];
        found->code = moec_expect_range(d->x, p->s, d->file[p->s], p->lo, p->hi, found);
    }
    return st;
}

static moec_status end_shard(data_pass *d, size_t s, moec_err *err)
{
    const char *name = moec_ckpt_shard_name(d->v->ckpt, s);
    const moec_json *line = moec_json_get(moec_json_get(d->v->manifest, "files"), name);
    const char *want = moec_json_string(moec_json_get(line, "xxh128"));
    moec_digest have = moec_hash_digest(d->hash);
    if (d->v->manifest && (!want || strcmp(want, have.hex) != 0))
        problem(d->v->r, "%s: its hash is %s, %s says %s", name, have.hex, MOEC_MANIFEST, want ? want : "nothing");
    else if (d->v->manifest)
        check_length(d->v, name, line, d->size[s]);
    moec_hash_free(d->hash);
    d->hash = NULL;
    return moec_hash_new(&d->hash, err);
}

/* In order of the pieces, one at a time. */
static moec_status hash_piece(void *ctx, int worker, int64_t lo, int64_t hi, moec_err *err)
{
    moec_status st = MOEC_OK;
    data_pass *d = ctx;
    if (d->found[worker].code != MOEC_OK)
        problem(d->v->r, "%s: %s", moec_ckpt_shard_name(d->v->ckpt, d->piece[lo].s), d->found[worker].text);
    for (int64_t i = lo; st == MOEC_OK && i < hi; i++) {
        const piece *p = &d->piece[i];
        moec_hash_add(d->hash, d->file[p->s] + p->lo, (size_t)(p->hi - p->lo));
        moec_pages_drop(d->file[p->s] + p->lo, (size_t)(p->hi - p->lo));
        moec_progress_step(&d->progress, p->hi - p->lo);
        if (p->hi == d->size[p->s])
            st = end_shard(d, p->s, err);
    }
    return st;
}

/* Where the checkpoint has mapped each shard: from its first tensor and that one's offset. */
static moec_status map_shards(data_pass *d, const moec_ckpt *c, moec_err *err)
{
    moec_status st = MOEC_OK;
    const size_t n = moec_ckpt_shards(c);
    MOEC_TRY(MOEC_NEW(d->file, n, err));
    MOEC_TRY(MOEC_NEW(d->size, n, err));
    for (size_t i = 0; i < moec_ckpt_count(c); i++) {
        const moec_tensor *t = moec_ckpt_at(c, i);
        size_t s = moec_ckpt_shard_of(c, i);
        d->file[s] = (const unsigned char *)t->data - moec_ckpt_offset(c, i);
        d->size[s] = moec_ckpt_offset(c, i) + t->bytes; /* the tensors tile the file, the last one ends it */
    }
    for (size_t s = 0; s < n; s++)
        for (uint64_t lo = 0; lo < d->size[s]; lo += PIECE)
            d->n++;
    MOEC_TRY(MOEC_NEW(d->piece, d->n, err));
    size_t at = 0;
    for (size_t s = 0; s < n; s++)
        for (uint64_t lo = 0; lo < d->size[s]; lo += PIECE)
            d->piece[at++] = (piece){.s = s, .lo = lo, .hi = d->size[s] - lo < PIECE ? d->size[s] : lo + PIECE};
done:
    return st;
}

/* Names, dtypes and shapes against the source; false in *good when data cannot be compared. */
static moec_status check_tensors(bool *good, data_pass *d, moec_err *err)
{
    moec_status st = MOEC_OK;
    const verifier *v = d->v;
    uint64_t before = v->r->problems;
    MOEC_TRY(moec_expect_new(&d->x, v->opt->source, v->plan, NULL, err));
    v->r->fitted = moec_expect_unknown(d->x);
    for (size_t s = 0; s < moec_ckpt_shards(v->ckpt); s++)
        MOEC_TRY(note(v, moec_expect_shard(d->x, d->file[s], (size_t)d->size[s], d->size[s],
                                           moec_ckpt_shard_name(v->ckpt, s), err), err));
    MOEC_TRY(note(v, moec_expect_all(d->x, err), err));
done:
    *good = st == MOEC_OK && v->r->problems == before;
    return st;
}

static moec_status check_data(const verifier *v, moec_err *err)
{
    moec_status st = MOEC_OK;
    data_pass d = {.v = v};
    bool compare = false;
    MOEC_TRY(map_shards(&d, v->ckpt, err));
    if (v->plan_fits)
        MOEC_TRY(check_tensors(&compare, &d, err));
    if (!compare) {
        moec_expect_free(d.x);
        d.x = NULL;
    }
    if (!v->opt->data)
        goto done;
    MOEC_TRY(MOEC_NEW(d.found, (size_t)moec_par_threads(), err));
    MOEC_TRY(moec_hash_new(&d.hash, err));
    uint64_t total = 0;
    for (size_t s = 0; s < moec_ckpt_shards(v->ckpt); s++)
        total += d.size[s];
    moec_progress_start(&d.progress, "verifying", "bytes", total, 0);
    MOEC_TRY(moec_par_ordered((int64_t)d.n, 1, compare_piece, hash_piece, &d, err));
    moec_progress_finish(&d.progress);
done:
    moec_hash_free(d.hash);
    moec_expect_free(d.x);
    moec_free(d.found);
    moec_free(d.piece);
    moec_free(d.size);
    moec_free(d.file);
    return st;
}

/* --- all of it ------------------------------------------------------------------------------------------------------- */

/* Before anything is looked up in the source by what the plan says. */
static moec_status check_plan(verifier *v, moec_err *err)
{
    moec_status st = MOEC_OK;
    const uint64_t before = v->r->problems;
    if (v->opt->source && v->plan) {
        st = note(v, moec_plan_check(v->plan, v->opt->source, v->source.hex, err), err);
        v->plan_fits = st == MOEC_OK && v->r->problems == before;
    }
    return st;
}

/* Codes are what the plan says, as far as it is of this many layers and experts. */
static moec_status check_codes(const verifier *v, moec_err *err)
{
    const moec_plan *p = v->plan;
    const moec_qformat *f = p && p->quant.format[0] ? moec_qformat_find(p->quant.format) : NULL;
    if (!v->m || !f || f->dense)
        return MOEC_OK;
    bool same = p->n_layers == v->m->moe_layers && (!p->quant.mat || p->quant.n_mat_layers == v->m->dims.layers);
    for (int64_t i = 0; same && i < p->n_layers; i++)
        same = p->layer[i].n_experts == v->m->dims.experts && p->layer[i].layer == v->m->set[i].layer;
    if (!same)
        problem(v->r, "the plan's widths are not of these layers and experts");
    return same ? note(v, moec__verify_codes(v->m, p, err), err) : MOEC_OK;
}

static moec_status check_all(verifier *v, moec_err *err)
{
    moec_status st = MOEC_OK;
    v->r->tensors = moec_ckpt_count(v->ckpt);
    v->r->bytes = moec_ckpt_bytes(v->ckpt);
    MOEC_TRY(read_manifest(v, err));
    v->r->experts = v->m ? v->m->dims.experts : v->plan ? moec_plan_experts(v->plan) : 0;
    v->r->top_k = v->m ? v->m->dims.top_k : v->plan ? v->plan->new_top_k : 0;
    v->r->n_clients = v->m ? moec_clients(v->r->client, v->m) : 0;
    check_index(v);
    MOEC_TRY(check_fingerprints(v, err));
    MOEC_TRY(check_plan(v, err));
    if (!v->m && v->plan_fits)
        v->r->n_clients = moec_clients_of(v->r->client, v->opt->source, v->plan);
    MOEC_TRY(check_numbers(v, err));
    MOEC_TRY(check_codes(v, err));
    MOEC_TRY(check_files(v, err));
    if (v->opt->source)
        MOEC_TRY(check_side(v, err));
    MOEC_TRY(check_data(v, err));
done:
    return st;
}

/* A model where this program can run it, else the files alone. */
static moec_status open_output(verifier *v, moec_err *err)
{
    moec_status st = moec_ckpt_open(&v->own, v->dir, err);
    v->ckpt = v->own;
    if (st != MOEC_OK || moec_json_get(moec_ckpt_config(v->own), MOEC_CONFIG_FACTORS) ||
        moec_json_get(moec_ckpt_config(v->own), MOEC_CONFIG_MAP))
        return st;
    moec_ckpt_close(v->own);
    v->own = NULL;
    st = moec_model_open(&v->m, v->dir, err);
    v->ckpt = v->m ? v->m->ckpt : NULL;
    return st;
}

moec_status moec_verify(moec_verify_report **out, const char *dir, const moec_verify_options *opt, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_err local = {MOEC_OK, ""};
    verifier v = {.dir = dir, .opt = opt};
    *out = NULL;
    MOEC_TRY(MOEC_NEW(v.r, 1, err));
    v.r->against_source = opt->source != NULL;
    if ((st = open_output(&v, &local)) == MOEC_OK)
        st = check_all(&v, &local);
    else
        st = note(&v, st, &local);
    if (st != MOEC_OK)
        st = moec_fail(err, st, "%s", local.text);
    *out = v.r;
    v.r = NULL;
done:
    if (st != MOEC_OK) {
        moec_verify_free(*out);
        *out = NULL;
    }
    moec_verify_free(v.r);
    moec_plan_free(v.plan);
    moec_json_free(v.manifest);
    moec_model_close(v.m);
    moec_ckpt_close(v.own);
    return st;
}

void moec_verify_free(moec_verify_report *r)
{
    moec_free(r);
}

moec_json *moec_verify_json(const moec_verify_report *r)
{
    moec_json *o = moec_json_new_object(), *list = moec_json_new_array(), *clients = moec_json_new_object();
    moec_json_set(o, "ok", moec_json_new_bool(r->problems == 0));
    moec_json_set(o, "against_source", moec_json_new_bool(r->against_source));
    moec_json_set(o, "manifest", moec_json_new_bool(r->has_manifest));
    moec_json_set(o, "files", moec_json_new_int((int64_t)r->files));
    moec_json_set(o, "tensors", moec_json_new_int((int64_t)r->tensors));
    moec_json_set(o, "bytes", moec_json_new_int((int64_t)r->bytes));
    moec_json_set(o, "experts", moec_json_new_int(r->experts));
    moec_json_set(o, "top_k", moec_json_new_int(r->top_k));
    for (uint64_t i = 0; i < r->problems && i < MOEC_VERIFY_SHOWN; i++)
        moec_json_push(list, moec_json_new_string(r->problem[i]));
    moec_json_set(o, "problems", list);
    for (int i = 0; i < r->n_clients; i++) {
        moec_json *c = moec_json_new_object();
        moec_json_set(c, "loads", moec_json_new_bool(r->client[i].loads));
        moec_json_set(c, "reason", moec_json_new_string(r->client[i].reason));
        if (r->client[i].advice[0])
            moec_json_set(c, "advice", moec_json_new_string(r->client[i].advice));
        moec_json_set(clients, r->client[i].name, c);
    }
    moec_json_set(o, "clients", clients);
    return o;
}
