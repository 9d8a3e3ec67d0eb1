/* Merges the experts of one random layer and prints how long that took, for comparison with other implementations.
 *
 *   dump_fill IN OUT [--threads N] [KEY=VALUE ..]      settings of moec_merge_set
 *
 * IN, as it lies in memory: int64 E, H, I, n, slots; int32 centre [E]; float64 weight [E], saliency [E]; float32 router [E,H]; of
 * each expert float32 gate [I,H], up [I,H], down [H,I]; float32 x [n,H]; int32 ids [n,slots]; float32 gates [n,slots].
 * OUT: router and experts afterwards, in the same form. Prints "wall CPU merged aligned moved dropped". */
#include "base/mem.h"
#include "base/par.h"
#include "method/merge.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

typedef struct layer {
    moec_family family;
    moec_model model;
    moec_layer from;
    moec_mlp *expert, *target;
    moec_tensor in, out;
    moec_merge_task task;
    moec_merge_groups groups;
    moec_merge_target to;
    int32_t *same;
    void *map;
    size_t bytes;
} layer;

static double seconds(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static moec_weight view(const moec_tensor *t, int64_t at, int64_t rows, int64_t cols)
{
    return (moec_weight){.of = t, .rows = rows, .cols = cols, .at = at, .row_step = cols, .col_step = 1};
}

static moec_status map_input(layer *l, const char *path, moec_err *err)
{
    struct stat s;
    const int fd = open(path, O_RDONLY);
    if (fd < 0 || fstat(fd, &s) != 0)
        return moec_fail(err, MOEC_EIO, "%s cannot be read", path);
    l->bytes = (size_t)s.st_size;
    l->map = mmap(NULL, l->bytes, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    return l->map == MAP_FAILED ? moec_fail(err, MOEC_EIO, "%s cannot be mapped", path) : MOEC_OK;
}

static moec_status map_output(layer *l, const char *path, moec_err *err)
{
    const int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0644);
    const size_t n = l->in.bytes;
    if (fd < 0 || ftruncate(fd, (off_t)n) != 0)
        return moec_fail(err, MOEC_EIO, "%s cannot be written", path);
    void *at = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (at == MAP_FAILED)
        return moec_fail(err, MOEC_EIO, "%s cannot be mapped", path);
    memcpy(at, l->in.data, n);
    l->out = l->in;
    l->out.data = at;
    return MOEC_OK;
}

static moec_status open_layer(layer *l, const char *in, const char *out, moec_err *err)
{
    moec_status st = MOEC_OK;
    MOEC_TRY(map_input(l, in, err));
    int64_t d[5];
    memcpy(d, l->map, sizeof d);
    const int64_t E = d[0], H = d[1], I = d[2], n = d[3], slots = d[4];
    const size_t each = (size_t)(3 * H * I), values = (size_t)(E * H) + (size_t)E * each;
    char *at = (char *)l->map + sizeof d;
    if (l->bytes != sizeof d + (size_t)E * 20 + 4 * (values + (size_t)(n * H) + 2 * (size_t)(n * slots)))
        return moec_fail(err, MOEC_EFORMAT, "%s has another size than its numbers say", in);
    l->groups.centre = (int32_t *)(void *)at;
    at += 4 * E;
    MOEC_TRY(MOEC_NEW(l->groups.weight, 2 * (size_t)E, err)); /* aligned */
    memcpy(l->groups.weight, at, 16 * (size_t)E);
    l->groups.saliency = l->groups.weight + E;
    at += 16 * E;
    l->in = (moec_tensor){.name = "layer", .dtype = MOEC_F32, .rank = 1, .dim = {(int64_t)values}, .data = at, .bytes = 4 * values};
    at += 4 * values;
    MOEC_TRY(map_output(l, out, err));
    MOEC_TRY(MOEC_NEW(l->expert, (size_t)E, err));
    MOEC_TRY(MOEC_NEW(l->target, (size_t)E, err));
    MOEC_TRY(MOEC_NEW(l->same, (size_t)E, err));
    for (int64_t e = 0; e < E; e++) {
        const int64_t first = E * H + e * (int64_t)each;
        for (int k = 0; k < 2; k++) {
            const moec_tensor *t = k ? &l->out : &l->in;
            moec_mlp *m = k ? &l->target[e] : &l->expert[e];
            *m = (moec_mlp){view(t, first, I, H), view(t, first + I * H, I, H), view(t, first + 2 * I * H, H, I)};
        }
        l->same[e] = (int32_t)e;
    }
    l->from.expert = l->expert;
    l->from.mat[MOEC_MAT_ROUTER] = view(&l->in, 0, E, H);
    l->model.family = &l->family;
    l->model.dims = (moec_dims){.hidden = H, .experts = E, .expert_width = I, .slots = slots, .groups = 1, .top_groups = 1};
    l->task = (moec_merge_task){.model = &l->model, .layer = &l->from, .n = n, .slots = slots, .blocks = 1};
    l->task.x = (const float *)(const void *)at;
    l->task.ids = (const int32_t *)(const void *)(at + 4 * n * H);
    l->task.gates = (const float *)(const void *)(at + 4 * n * H + 4 * n * slots);
    l->to = (moec_merge_target){.expert = l->target, .router = view(&l->out, 0, E, H), .row = l->same};
done:
    return st;
}

int main(int argc, char **argv)
{
    moec_err err = {MOEC_OK, ""};
    moec_status st = MOEC_OK;
    layer *l = NULL;
    moec_merge_tally tally;
    moec_merge_recipe r = {.rank = 1.0, .segment = {.up = 0.5, .down = 0.5, .alpha = 0.5, .rounds = 30}};
    if (argc < 3) {
        fprintf(stderr, "usage: dump_fill IN OUT [--threads N] [KEY=VALUE ..]\n");
        return 2;
    }
    MOEC_TRY(MOEC_NEW(l, 1, &err));
    for (int i = 3; i < argc; i++) {
        if (strcmp(argv[i], "--threads") == 0 && i + 1 < argc)
            moec_par_set_threads(atoi(argv[++i]));
        else
            MOEC_TRY(moec_merge_set(&r, argv[i], &err));
    }
    MOEC_TRY(open_layer(l, argv[1], argv[2], &err));
    const double wall = seconds(CLOCK_MONOTONIC), cpu = seconds(CLOCK_PROCESS_CPUTIME_ID);
    MOEC_TRY(moec_merge_fill_all(&tally, &l->to, &l->task, &l->groups, &r, &err));
    printf("%.3f %.3f %lld %lld %lld %lld\n", seconds(CLOCK_MONOTONIC) - wall, seconds(CLOCK_PROCESS_CPUTIME_ID) - cpu,
           (long long)tally.merged, (long long)tally.aligned, (long long)tally.moved, (long long)tally.dropped);
done:
    if (st != MOEC_OK)
        fprintf(stderr, "dump_fill: %s\n", err.text);
    if (l) {
        moec_free(l->groups.weight);
        moec_free(l->expert);
        moec_free(l->target);
        moec_free(l->same);
        moec_free(l);
    }
    return moec_exit_code(st);
}
