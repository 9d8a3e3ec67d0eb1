/* Statistics whose large kinds stay in their file. */
#include "base/mem.h"
#include "calib/stats_internal.h"

#include <string.h>

void moec__stats_lean_free(struct moec_stats_lean *v)
{
    if (!v)
        return;
    const moec_status closed = moec_h5_close(v->file, NULL);
    (void)closed; /* was only read */
    for (size_t i = 0; i < v->n_groups; i++)
        moec_free(v->group[i]);
    moec_free(v->group);
    moec_free(v);
}

moec_status moec__stats_lean_refuse(moec_err *err)
{
    return moec_fail(err, MOEC_EINVAL, "these statistics were opened without their sums; moec_stats_load reads them");
}

bool moec_stats_holds(const moec_stats *s, moec_stat kind)
{
    bool all = s->n_domains > 0;
    for (int d = 0; d < s->n_domains; d++)
        all = all && (s->domain[d].data[kind] || (s->lean && s->lean->there[kind]));
    return all;
}

uint64_t moec_stats_memory(const moec_stats *s)
{
    uint64_t sum = 0;
    for (int d = 0; d < s->n_domains; d++)
        for (int k = 0; k < MOEC_STAT_COUNT; k++)
            if (s->domain[d].data[k])
                sum += (uint64_t)moec_stat_cells(&s->meta, (moec_stat)k) * (uint64_t)moec_stat_blocks(&s->meta, (moec_stat)k) *
                       moec_cell_bytes(moec_stat_kinds[k].cell);
    return sum;
}

/* Rows of a block of a kind from the file. */
static moec_status read_cells(void *out, const moec_stats *s, int domain, moec_stat kind, int64_t block, int64_t row, int64_t rows,
                              moec_err *err)
{
    const moec_stat_kind *k = &moec_stat_kinds[kind];
    char *path = NULL;
    int64_t dim[MOEC_STATS_MAX_RANK] = {0}, first[MOEC_STATS_MAX_RANK] = {0}, count[MOEC_STATS_MAX_RANK];
    const int rank = moec__stat_dims(&s->meta, kind, dim), at = k->layers > 0; /* axis of rows */
    moec_status st = MOEC_OK;
    memcpy(count, dim, sizeof count);
    if (at == 1) {
        first[0] = block;
        count[0] = 1;
    }
    if (at < rank) {
        first[at] = row;
        count[at] = rows;
    }
    MOEC_TRY(moec__stat_path(&path, s->lean->group[domain], kind, err));
    MOEC_TRY(moec_h5_get_part(out, s->lean->file, path, moec__cell_dtype(k->cell), rank, dim, first, count, err));
done:
    moec_free(path);
    return st;
}

moec_status moec_stats_fetch(void *out, const moec_stats *s, int domain, moec_stat kind, int64_t moe_layer, int64_t first, int64_t n,
                             moec_err *err)
{
    moec_status st = MOEC_OK;
    const moec_stat_kind *k = &moec_stat_kinds[kind];
    int64_t dim[MOEC_STATS_MAX_RANK];
    const int rank = moec__stat_dims(&s->meta, kind, dim), at = k->layers > 0;
    const int64_t block = k->layers > 0 ? moe_layer : 0, blocks = moec_stat_blocks(&s->meta, kind);
    const int64_t rows = at < rank ? dim[at] : 1, cells = moec_stat_cells(&s->meta, kind);
    if (domain < 0 || domain >= s->n_domains || !moec_stats_holds(s, kind))
        return moec_fail(err, MOEC_EFORMAT, "the statistics do not have %s", k->name);
    if (block < 0 || block >= blocks || first < 0 || n < 1 || n > rows || first > rows - n)
        return moec_fail(err, MOEC_EINVAL, "%s: rows beyond those of its layer were asked for", k->name);
    const int64_t each = cells / rows;
    const char *whole = moec_stat_at(s, domain, kind, block);
    const size_t bytes = moec_cell_bytes(k->cell);
    if (whole) {
        memcpy(out, whole + (size_t)(first * each) * bytes, (size_t)(n * each) * bytes);
        return MOEC_OK;
    }
    MOEC_TRY(read_cells(out, s, domain, kind, block, first, n, err));
    MOEC_TRY(moec__stats_cells_check(s, domain, kind, out, block * cells + first * each, n * each, MOEC_EFORMAT, err));
done:
    return st;
}
