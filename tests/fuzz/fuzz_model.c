/* A model folder from anywhere: config.json, a line "---", then the JSON header of model.safetensors, whose data is zeros of as
 * many bytes as its offsets ask for. Opening ends in a model or in a code with one line of text; every tensor of a model that
 * opens has a place, and what runs on it takes memory by its tensors, not by numbers of its config. */
#include "base/json.h"
#include "base/mem.h"
#include "base/par.h"
#include "model/forward.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { DATA_MAX = 4 << 20, TOKENS = 4 };
static char folder[] = "/tmp/moec-fuzz-XXXXXX";
static const char *const names[] = {"config.json", "model.safetensors"};

static void check(bool holds)
{
    if (!holds)
        abort();
}

static void leave(void)
{
    char path[64];
    for (size_t i = 0; i < MOEC_COUNT(names); i++) {
        snprintf(path, sizeof path, "%s/%s", folder, names[i]);
        unlink(path);
    }
    rmdir(folder);
}

/* Bytes behind the header: the largest end of its offsets. */
static int64_t data_bytes(const char *header, size_t n)
{
    moec_err err = {MOEC_OK, ""};
    moec_json *root = NULL, *entry;
    const char *key;
    void *it = NULL;
    int64_t most = 0, end;
    if (moec_json_parse(&root, header, n, "header", &err) == MOEC_OK)
        while (moec_json_type(root) == MOEC_JSON_OBJECT && moec_json_each(root, &it, &key, &entry))
            if (moec_json_int(moec_json_at(moec_json_get(entry, "data_offsets"), 1), &end) && end > most)
                most = end;
    moec_json_free(root);
    return most < DATA_MAX ? most : DATA_MAX;
}

static void put(const char *name, const void *front, size_t n_front, const void *bytes, size_t n, int64_t zeros)
{
    char path[64];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    check(fd >= 0 && write(fd, front, n_front) == (ssize_t)n_front && write(fd, bytes, n) == (ssize_t)n);
    check(ftruncate(fd, (off_t)(n_front + n) + zeros) == 0);
    close(fd);
}

static void run(const moec_model *m)
{
    moec_err err = {MOEC_OK, ""};
    moec_forward *f = NULL;
    const moec_forward_opts o = {.workers = 1, .max_tokens = TOKENS, .max_seq = TOKENS, .watch = true, .sums = true};
    const int32_t ids[TOKENS] = {0, (int32_t)(m->dims.vocab - 1), 0, 0};
    const int64_t seq[3] = {0, 1, TOKENS};
    float *h = NULL, *carried = NULL;
    check(moec_forward_bytes(m, &o) < (size_t)256 << 20);
    moec_status st = moec_forward_new(&f, m, &o, &err);
    if (st == MOEC_OK)
        st = MOEC_NEW(h, (size_t)(TOKENS * m->dims.hidden), &err);
    if (st == MOEC_OK)
        st = MOEC_NEW(carried, (size_t)(TOKENS * m->dims.carried), &err);
    if (st == MOEC_OK)
        st = moec_forward_embed(h, m, ids, TOKENS, &err);
    for (int64_t i = 0; st == MOEC_OK && i < m->dims.layers; i++) {
        st = moec_forward_layer(f, i, &err);
        if (st == MOEC_OK)
            st = moec_forward_chunk(f, 0, h, carried, seq, 2, NULL, NULL, &err);
    }
    for (int64_t i = 0; st == MOEC_OK && i < TOKENS * m->dims.hidden; i++)
        check(h[i] - h[i] == 0.0F);
    check(st == err.code);
    moec_free(h);
    moec_free(carried);
    moec_forward_free(f);
}

static void look(const moec_model *m)
{
    moec_err err = {MOEC_OK, ""};
    moec_place *place = NULL;
    moec_sizes sizes;
    check(moec_model_places(&place, m, &err) == MOEC_OK && moec_model_sizes(&sizes, m, &err) == MOEC_OK);
    check(sizes.active <= sizes.total && sizes.routed <= sizes.total && sizes.routed_bytes <= sizes.bytes);
    for (size_t i = 0; i < moec_ckpt_count(m->ckpt); i++) {
        const moec_place *p = &place[i];
        const moec_tensor *t = moec_ckpt_at(m->ckpt, i);
        check(p->role == MOEC_ROLE_OTHER || (p->set >= 0 && p->set < m->sets));
        check(p->role != MOEC_ROLE_STACK || (p->axis < t->rank && (t->dim[p->axis] - p->tail) % m->dims.experts == 0));
        check(p->across >= 0 && p->across <= m->sets && (p->across == 0 || t->rank == 2));
        check(p->role != MOEC_ROLE_EXPERT || (p->expert >= 0 && p->expert < m->dims.experts + m->family->n_tail));
        check(p->role != MOEC_ROLE_EXPERT || p->number_at < strlen(t->name));
    }
    moec_free(place);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char line[] = "\n---\n";
    static bool made;
    moec_err err = {MOEC_OK, ""};
    moec_model *m = NULL;
    const uint8_t *cut = memmem(data, size, line, sizeof line - 1);
    if (!cut)
        return 0;
    if (!made) {
        check(mkdtemp(folder) != NULL);
        moec_par_set_threads(1);
        atexit(leave);
        made = true;
    }
    const size_t config = (size_t)(cut - data), header = size - config - (sizeof line - 1);
    const uint64_t length = header;
    put(names[0], data, config, NULL, 0, 0);
    const char *json = (const char *)cut + sizeof line - 1;
    put(names[1], &length, sizeof length, json, header, data_bytes(json, header));
    moec_status st = moec_model_open(&m, folder, &err);
    if (st == MOEC_OK) {
        look(m);
        run(m);
    } else {
        check(!m && err.code == st && err.text[0] != '\0' && !strchr(err.text, '\n'));
        check(st == MOEC_EFORMAT || st == MOEC_ESHAPE);
    }
    moec_model_close(m);
    return 0;
}
