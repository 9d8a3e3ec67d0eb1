/* The files around the tensors: which are copied. */
#include "run/extra.h"
#include "run/layout.h"

#include "base/file.h"
#include "base/mem.h"
#include "text/utf8.h"

#include <fnmatch.h>
#include <string.h>
#include <sys/stat.h>

static const char other_weights[] = "holds the weights of the unpruned model";

/* Names that are not simply copied; the first match counts. */
static const struct side_rule {
    const char *pattern;
    moec_side_kind kind;
    const char *reason;
} rules[] = {
    {"config.json", MOEC_SIDE_REWRITE, NULL},
    {MOEC_INDEX_NAME, MOEC_SIDE_REWRITE, NULL},
    {MOEC_MANIFEST, MOEC_SIDE_REWRITE, NULL},
    {MOEC_PARTIAL_MARK, MOEC_SIDE_LEAVE, "marks an unfinished output"},
    {"*.safetensors", MOEC_SIDE_LEAVE, "is not one of the model's shards"},
    {"*.safetensors.index.json", MOEC_SIDE_LEAVE, "lists other weights"},
    {"pytorch_model*.bin", MOEC_SIDE_LEAVE, other_weights},
    {"pytorch_model*.bin.index.json", MOEC_SIDE_LEAVE, other_weights},
    {"*.gguf", MOEC_SIDE_LEAVE, other_weights},
    {"*.pth", MOEC_SIDE_LEAVE, other_weights},
    {"*.pt", MOEC_SIDE_LEAVE, other_weights},
    {"*.ckpt", MOEC_SIDE_LEAVE, other_weights},
    {"flax_model*.msgpack*", MOEC_SIDE_LEAVE, other_weights},
    {"tf_model*.h5*", MOEC_SIDE_LEAVE, other_weights},
    {"*.onnx", MOEC_SIDE_LEAVE, other_weights},
    {"*.onnx_data", MOEC_SIDE_LEAVE, other_weights},
};

static void classify(moec_side *s, const moec_ckpt *c, const struct stat *info, bool found)
{
    if (!found || !S_ISREG(info->st_mode)) {
        s->kind = MOEC_SIDE_LEAVE;
        s->reason = !found ? "leads nowhere" : S_ISDIR(info->st_mode) ? "is a folder" : "is not a regular file";
        return;
    }
    for (size_t i = 0; i < moec_ckpt_shards(c); i++)
        if (strcmp(s->name, moec_ckpt_shard_name(c, i)) == 0) {
            s->kind = MOEC_SIDE_REWRITE;
            return;
        }
    for (size_t i = 0; i < MOEC_COUNT(rules); i++)
        if (fnmatch(rules[i].pattern, s->name, 0) == 0) {
            s->kind = rules[i].kind;
            s->reason = rules[i].reason;
            return;
        }
    s->kind = MOEC_SIDE_COPY;
}

/* The manifest is JSON and names every file. */
static moec_status check_name(const char *name, const char *dir, moec_err *err)
{
    size_t n = strlen(name);
    return moec__utf8_check(name, n) == n ? MOEC_OK
                                          : moec_fail(err, MOEC_EFORMAT, "%s: the file name %s is not UTF-8; rename it or move "
                                                      "it away", dir, name);
}

moec_status moec_side_scan(moec_side_list *out, const moec_ckpt *c, const moec_plan *p, moec_err *err)
{
    moec_status st = MOEC_OK;
    char **names = NULL, *path = NULL;
    size_t n = 0;
    *out = (moec_side_list){0};
    MOEC_TRY(moec_dir_list(&names, &n, moec_ckpt_dir(c), err));
    MOEC_TRY(MOEC_NEW(out->at, n, err));
    for (size_t i = 0; i < n; i++) {
        struct stat info = {0};
        MOEC_TRY(moec_path_join(&path, moec_ckpt_dir(c), names[i], err));
        moec_side *s = &out->at[out->n++];
        s->name = names[i];
        names[i] = NULL; /* moved */
        MOEC_TRY(check_name(s->name, moec_ckpt_dir(c), err));
        classify(s, c, &info, stat(path, &info) == 0);
        if (p && moec_plan_brings_code(p) && strcmp(s->name, MOEC_MODELING_NAME) == 0)
            s->kind = MOEC_SIDE_REWRITE;
        moec_free(path);
        path = NULL;
    }
done:
    moec_names_free(names, n);
    moec_free(path);
    if (st != MOEC_OK)
        moec_side_release(out);
    return st;
}

void moec_side_release(moec_side_list *l)
{
    for (size_t i = 0; i < l->n; i++)
        moec_free(l->at[i].name);
    moec_free(l->at);
    *l = (moec_side_list){0};
}
