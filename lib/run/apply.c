/* See apply.h. */
#include "run/apply.h"

#include "base/file.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/opt.h"
#include "base/par.h"
#include "base/version.h"
#include "run/expect.h"
#include "run/layout.h"
#include "run/preview.h"
#include "run/verify.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What stays resident while the pieces go by: the program itself, two mapped windows a worker, and the names and headers of
 * the tensors (JSON trees of a header while it is parsed are the largest part). */
static uint64_t memory_needed(const moec_model *m)
{
    const uint64_t program = 48u << 20, window = 24u << 20, tensor = 3072;
    return program + window * (uint64_t)moec_par_threads() + tensor * moec_ckpt_count(m->ckpt);
}

/* Of the manifest at most, beside its plan: an entry for each file, and what stands around them. */
static uint64_t manifest_room(const moec_layout *l)
{
    const uint64_t head = 1200, entry = 112; /* the folder's name, too */
    uint64_t n = head;
    for (size_t i = 0; i < moec_out_shards(l->files); i++)
        n += entry + strlen(moec_out_shard_name(l->files, i));
    for (size_t i = 0; i < l->side.n; i++)
        n += entry + 6 * strlen(l->side.at[i].name) + (l->side.at[i].reason ? strlen(l->side.at[i].reason) : 0);
    return n;
}

static moec_status estimate(moec_apply_result *r, const moec_model *m, const moec_layout *l,
                            const moec_apply_options *opt, moec_err *err)
{
    char a[32], b[32];
    *r = (moec_apply_result){.source_bytes = moec_ckpt_bytes(m->ckpt), .output_bytes = l->tensor_bytes,
                             .dead_bytes = l->dead_bytes,
                             .disk_bytes = moec_out_total(l->files), .manifest_bytes = manifest_room(l),
                             .memory_bytes = memory_needed(m)};
    for (size_t i = 0; i < l->side.n; i++)
        r->left_out += l->side.at[i].kind == MOEC_SIDE_LEAVE;
    if (opt->max_memory > 0 && opt->max_memory < r->memory_bytes)
        return moec_fail(err, MOEC_ENOFIT, "--max-memory %s: writing needs %s%s", moec_size_text(a, sizeof a, opt->max_memory),
                         moec_size_text_up(b, sizeof b, r->memory_bytes), moec_par_threads() > 1 ? "; fewer --threads need less" : "");
    return opt->out ? moec_disk_free(&r->disk_free, opt->out, err) : MOEC_OK;
}

static moec_status check_plan(moec_digest *print, const moec_model *m, const moec_plan *p,
                              const moec_apply_options *opt, moec_err *err)
{
    moec_status st = MOEC_OK;
    if (opt->fingerprint)
        snprintf(print->hex, sizeof print->hex, "%s", opt->fingerprint);
    else
        st = moec_ckpt_fingerprint(print, m->ckpt, err);
    return st == MOEC_OK ? moec_plan_check(p, m, print->hex, err) : st;
}

moec_status moec_apply_estimate(moec_apply_result *out, const moec_model *m, const moec_plan *p,
                                const moec_apply_options *opt, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_layout l = {0};
    moec_digest print;
    *out = (moec_apply_result){0};
    MOEC_TRY(check_plan(&print, m, p, opt, err));
    MOEC_TRY(moec_layout_build(&l, m, p, opt->weights, err));
    MOEC_TRY(estimate(out, m, &l, opt, err));
done:
    moec_layout_release(&l);
    return st;
}

/* --- the manifest ---------------------------------------------------------------------------------------------------- */

static moec_json *files_json(const moec_writer *w)
{
    moec_json *o = moec_json_new_object();
    for (size_t i = 0; i < moec_writer_files(w); i++) {
        uint64_t bytes;
        moec_digest hash;
        const char *name = moec_writer_file(&bytes, &hash, w, i);
        moec_json *f = moec_json_new_object();
        moec_json_set(f, "bytes", moec_json_new_int((int64_t)bytes));
        moec_json_set(f, "xxh128", moec_json_new_string(hash.hex));
        moec_json_set(o, name, f);
    }
    return o;
}

static moec_json *left_out_json(const moec_side_list *l)
{
    moec_json *o = moec_json_new_object();
    for (size_t i = 0; i < l->n; i++)
        if (l->at[i].kind == MOEC_SIDE_LEAVE)
            moec_json_set(o, l->at[i].name, moec_json_new_string(l->at[i].reason));
    return o;
}

/* The folder's own name, also for "." and "dir/.."; nothing of where it lies. */
static moec_json *folder_name(const char *dir)
{
    char *real = realpath(dir, NULL);
    moec_json *v = moec_json_new_string(moec_path_base(real ? real : dir));
    free(real); /* libc's own allocation */
    return v;
}

static moec_json *model_json(const moec_digest *print, const moec_ckpt *c)
{
    moec_json *o = moec_json_new_object();
    moec_json_set(o, "fingerprint", moec_json_new_string(print->hex));
    moec_json_set(o, "bytes", moec_json_new_int((int64_t)moec_ckpt_bytes(c)));
    moec_json_set(o, "tensors", moec_json_new_int((int64_t)moec_ckpt_count(c)));
    return o;
}

/* What is written. */
typedef struct job {
    const moec_model *m;
    const moec_plan *p;
    const moec_layout *l;
    const moec_override *weights; /* computed anew, or NULL */
    const moec_digest *print; /* of the model */
    char *plan_text;
} job;

/* Text of moecompress.json: no times, paths or machine in it, so that the same input gives the same bytes. */
static moec_status manifest_text(char **out, const moec_writer *w, const job *j, const moec_ckpt *made, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_digest after;
    char *text = NULL, *plan = NULL;
    moec_json *o = moec_json_new_object(), *source = NULL;
    MOEC_TRY(moec_ckpt_fingerprint(&after, made, err));
    source = model_json(j->print, j->m->ckpt);
    moec_json_set(source, "name", folder_name(moec_ckpt_dir(j->m->ckpt)));
    moec_json_set(source, "model_type", moec_json_new_string(j->m->family->model_type));
    moec_json_set(o, "moecompress", moec_json_new_string(moec_version()));
    moec_json_set(o, "verb", moec_json_new_string(moec_plan_kind(j->p)));
    moec_json_set(o, "method", moec_json_new_string(j->p->method));
    moec_json_set(o, "source", source);
    moec_json_set(o, "output", model_json(&after, made));
    moec_json_set(o, "stats", moec_json_new_string(j->p->stats));
    moec_json_set(o, "files", files_json(w));
    moec_json_set(o, "left_out", left_out_json(&j->l->side));
    moec_json_set(o, "plan", moec_json_new_null());
    MOEC_TRY(moec_json_dump(&text, o, 2, err));
    size_t n = strlen(j->plan_text);
    while (n > 0 && j->plan_text[n - 1] == '\n')
        n--;
    MOEC_TRY(moec_copy(&plan, j->plan_text, n, err));
    MOEC_TRY(moec_json_edit(out, text, "plan", plan, err)); /* the plan keeps its one line a layer */
done:
    moec_json_free(o);
    moec_free(plan);
    moec_free(text);
    return st;
}

/* --- writing --------------------------------------------------------------------------------------------------------- */

static void say_what_is_left(const moec_layout *l)
{
    for (size_t i = 0; i < l->side.n; i++)
        if (l->side.at[i].kind == MOEC_SIDE_LEAVE)
            moec_say("%s: left out, it %s", l->side.at[i].name, l->side.at[i].reason);
    if (l->loose > 0)
        moec_warn("%llu expert tensors belong to no layer that is known; they are copied whole",
                  (unsigned long long)l->loose);
}

static moec_status expect_output(moec_expect **out, const job *j, moec_err *err)
{
    const moec_out *files = j->l->files;
    moec_status st = moec_expect_new(out, j->m, j->p, j->weights, err);
    for (size_t s = 0; st == MOEC_OK && s < moec_out_shards(files); s++) {
        size_t len;
        const char *head = moec_out_header(&len, files, s);
        st = moec_expect_shard(*out, head, len, moec_out_size(files, s), moec_out_shard_name(files, s), err);
    }
    return st == MOEC_OK ? moec_expect_all(*out, err) : st;
}

/* Everything between the last data byte and the final name. */
static moec_status seal(moec_writer *w, const job *j, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_ckpt *made = NULL;
    moec_verify_report *report = NULL;
    char *manifest = NULL;
    const moec_verify_options check = {.source = j->m, .source_fingerprint = j->print->hex, .unfinished = true};
    MOEC_TRY(moec_within(err, moec_ckpt_open(&made, moec_writer_dir(w), err), "verifying the output"));
    MOEC_TRY(manifest_text(&manifest, w, j, made, err));
    MOEC_TRY(moec_writer_add(w, MOEC_MANIFEST, manifest, strlen(manifest), err));
    MOEC_TRY(moec_verify(&report, moec_writer_dir(w), &check, err));
    if (report->problems > 0)
        st = moec_fail(err, MOEC_EIO, "verifying the output: %s", report->problem[0]);
done:
    moec_verify_free(report);
    moec_free(manifest);
    moec_ckpt_close(made);
    return st;
}

static moec_status write_all(const job *what, const moec_apply_options *opt, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_writer *w = NULL;
    moec_expect *x = NULL;
    char *identity = NULL;
    job j = *what;
    MOEC_TRY(moec_plan_to_text(&j.plan_text, j.p, err));
    MOEC_TRY(moec_format(&identity, err, "%s\n%s\n%s", moec_version(), j.print->hex, j.plan_text));
    MOEC_TRY(expect_output(&x, &j, err));
    const moec_writer_options wo = {.dir = opt->out, .source = moec_ckpt_dir(j.m->ckpt), .identity = identity,
                                    .overwrite = opt->overwrite, .resume = opt->resume,
                                    .check = moec_expect_range, .ctx = x};
    MOEC_TRY(moec_writer_open(&w, j.l->files, &wo, err));
    say_what_is_left(j.l);
    MOEC_TRY(moec_writer_run(w, err));
    if ((st = moec_ckpt_unchanged(j.m->ckpt, err)) != MOEC_OK || (st = seal(w, &j, err)) != MOEC_OK) {
        if (st == MOEC_EIO || st == MOEC_EFORMAT || st == MOEC_ESHAPE)
            moec_writer_discard(w);
        goto done;
    }
    MOEC_TRY(moec_writer_publish(w, err));
done:
    moec_writer_close(w);
    moec_expect_free(x);
    moec_free(identity);
    moec_free(j.plan_text);
    return st;
}

moec_status moec_apply(moec_apply_result *out, const moec_model *m, const moec_plan *p, const moec_apply_options *opt,
                       moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_layout l = {0};
    moec_digest print;
    *out = (moec_apply_result){0};
    MOEC_TRY(check_plan(&print, m, p, opt, err));
    MOEC_TRY(moec_preview_check(p, opt->weights, err));
    MOEC_TRY(moec_layout_build(&l, m, p, opt->weights, err));
    MOEC_TRY(estimate(out, m, &l, opt, err));
    const job j = {.m = m, .p = p, .l = &l, .weights = opt->weights, .print = &print};
    MOEC_TRY(write_all(&j, opt, err));
done:
    moec_layout_release(&l);
    return st;
}
