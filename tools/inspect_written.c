/* See inspect_written.h. The model is not opened: this program has no forward pass for it. */
#include "inspect_written.h"

#include <string.h>

enum { MANIFEST_BYTES = 1 << 30, LINE = 200 };
static const char runs[] = "transformers 5 with trust_remote_code, by modeling_moecompress.py; no other, and eval measures it as a plan only";

typedef struct written {
    const moec_ckpt *c;
    moec_json *manifest; /* NULL: none */
    moec_json *factors, *map; /* of config.json; one is there */
    int64_t rows, least, most; /* of a map: rows of a router, and experts of a layer */
} written;

/* A string of a file that anybody may have written, as a line; "unknown" where there is none. */
static const char *plain(char out[LINE], const moec_json *v)
{
    const char *text = moec_json_string(v);
    snprintf(out, LINE, "%s", text ? text : "unknown");
    moec_plain_line(out);
    return out;
}

static void count_map(written *w)
{
    void *it = NULL;
    const char *layer;
    moec_json *table;
    while (w->map && moec_json_each(w->map, &it, &layer, &table)) {
        int64_t most = 0, v;
        const int64_t rows = (int64_t)moec_json_len(table);
        for (size_t i = 0; i < (size_t)rows; i++)
            if (moec_json_int(moec_json_at(table, i), &v) && v >= most && v < rows)
                most = v + 1;
        w->rows = rows > w->rows ? rows : w->rows;
        w->least = w->least == 0 || most < w->least ? most : w->least;
        w->most = most > w->most ? most : w->most;
    }
}

static moec_json *to_json(const written *w)
{
    static const char *const said[] = {"verb", "method"};
    char line[LINE];
    const moec_json *config = moec_ckpt_config(w->c);
    moec_json *o = moec_json_new_object();
    moec_json_set(o, "model_type", moec_json_new_string(plain(line, moec_json_get(config, "model_type"))));
    moec_json_set(o, "architecture", moec_json_new_string(plain(line, moec_json_at(moec_json_get(config, "architectures"), 0))));
    moec_json_set(o, "emit", moec_json_new_string(w->map ? "map" : "factored"));
    if (w->map) {
        moec_json_set(o, "router_rows", moec_json_new_int(w->rows));
        moec_json_set(o, "least_experts", moec_json_new_int(w->least));
        moec_json_set(o, "most_experts", moec_json_new_int(w->most));
    } else {
        moec_json_set(o, "factors", moec_json_clone(w->factors));
    }
    for (size_t i = 0; i < MOEC_COUNT(said); i++)
        moec_json_set(o, said[i], moec_json_new_string(plain(line, moec_json_get(w->manifest, said[i]))));
    moec_json_set(o, "source", moec_json_new_string(plain(line, moec_json_get(moec_json_get(w->manifest, "source"), "name"))));
    moec_json_set(o, "tensors", moec_json_new_int((int64_t)moec_ckpt_count(w->c)));
    moec_json_set(o, "bytes", moec_json_new_int((int64_t)moec_ckpt_bytes(w->c)));
    moec_json_set(o, "shards", moec_json_new_int((int64_t)moec_ckpt_shards(w->c)));
    moec_json_set(o, "runs", moec_json_new_string(runs));
    return o;
}

static void print_table(const written *w)
{
    char a[LINE], b[LINE], c[LINE];
    const moec_json *config = moec_ckpt_config(w->c);
    printf("%-14s model_type %s, architecture %s\n", "config.json", plain(a, moec_json_get(config, "model_type")),
           plain(b, moec_json_at(moec_json_get(config, "architectures"), 0)));
    if (w->manifest)
        printf("%-14s by %s, method %s, from %s\n", "made", plain(a, moec_json_get(w->manifest, "verb")),
               plain(b, moec_json_get(w->manifest, "method")), plain(c, moec_json_get(moec_json_get(w->manifest, "source"), "name")));
    if (w->factors)
        printf("%-14s their matrices are factors: %s\n", "experts", plain(a, moec_json_get(w->factors, "method")));
    else if (w->least == w->most)
        printf("%-14s %lld a layer, shared by the %lld rows of its router (a map)\n", "experts", (long long)w->most, (long long)w->rows);
    else
        printf("%-14s %lld to %lld a layer, shared by the %lld rows of its router (a map)\n", "experts", (long long)w->least,
               (long long)w->most, (long long)w->rows);
    printf("%-14s %zu, %s in %zu shard%s\n", "tensors", moec_ckpt_count(w->c), moec_size_text(a, sizeof a, moec_ckpt_bytes(w->c)),
           moec_ckpt_shards(w->c), tool_s((int64_t)moec_ckpt_shards(w->c)));
    printf("%-14s %s\n", "runs in", runs);
}

moec_status tool_inspect_written(bool *it_is, const char *dir, bool json, moec_err *err)
{
    moec_status st = MOEC_OK;
    moec_ckpt *c = NULL;
    char *path = NULL;
    written w = {.c = NULL};
    *it_is = false;
    MOEC_TRY(moec_ckpt_open(&c, dir, err));
    w.c = c;
    w.factors = moec_json_get(moec_ckpt_config(c), MOEC_CONFIG_FACTORS);
    w.map = w.factors ? NULL : moec_json_get(moec_ckpt_config(c), MOEC_CONFIG_MAP);
    if (!w.factors && !w.map)
        goto done;
    *it_is = true;
    if (moec_json_type(w.factors ? w.factors : w.map) != MOEC_JSON_OBJECT)
        MOEC_TRY(moec_fail(err, MOEC_EFORMAT, "%s/config.json: %s is no JSON object", dir, w.factors ? MOEC_CONFIG_FACTORS : MOEC_CONFIG_MAP));
    MOEC_TRY(moec_path_join(&path, dir, MOEC_MANIFEST, err));
    if (moec_path_exists(path))
        MOEC_TRY(moec_json_read(&w.manifest, path, MANIFEST_BYTES, err));
    count_map(&w);
    if (json)
        MOEC_TRY(tool_print_json(to_json(&w), err));
    else
        print_table(&w);
done:
    moec_free(path);
    moec_json_free(w.manifest);
    moec_ckpt_close(c);
    return st;
}
