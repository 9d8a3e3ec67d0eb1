/* The front of a safetensors file from anywhere: whatever is accepted describes ranges that lie in the file, do not
 * overlap, and are as long as their shapes say; and writing it again gives the same index. */
#include "base/mem.h"
#include "ckpt/safetensors.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(bool holds)
{
    if (!holds)
        abort();
}

static void check_entries(const moec_st_index *ix, uint64_t file_size)
{
    uint64_t at = 0;
    check(ix->data_at <= file_size);
    for (size_t i = 0; i < ix->n; i++) {
        const moec_st_entry *e = &ix->entry[i];
        uint64_t bytes = e->dtype < MOEC_DTYPE_COUNT ? (uint64_t)moec_dtypes[e->dtype].bytes : 0;
        check(bytes > 0 && e->name && e->rank >= 0 && e->rank <= MOEC_MAX_RANK);
        for (int k = 0; k < e->rank; k++) {
            check(e->dim[k] >= 0);
            check(!__builtin_mul_overflow(bytes, (uint64_t)e->dim[k], &bytes));
        }
        check(e->begin == at && e->end - e->begin == bytes);
        at = e->end;
    }
    check(at == file_size - ix->data_at);
}

static void check_round_trip(const moec_st_index *ix, uint64_t data_bytes)
{
    char *header;
    size_t len;
    moec_err err = {MOEC_OK, ""};
    moec_st_index again = {0};
    check(moec_st_header(&header, &len, ix->entry, ix->n, ix->metadata, &err) == MOEC_OK);
    check(len % 8 == 0);
    check(moec_st_parse(&again, header, len, len + data_bytes, "again", &err) == MOEC_OK);
    check(again.n == ix->n && again.data_at == len);
    for (size_t i = 0; i < ix->n; i++) {
        const moec_st_entry *a = &ix->entry[i], *b = &again.entry[i];
        check(strcmp(a->name, b->name) == 0 && a->dtype == b->dtype && a->rank == b->rank);
        check(memcmp(a->dim, b->dim, (size_t)a->rank * sizeof *a->dim) == 0);
        check(a->begin == b->begin && a->end == b->end);
    }
    moec_st_index_release(&again);
    moec_free(header);
}

static void parse(const uint8_t *data, size_t size, uint64_t file_size)
{
    moec_err err = {MOEC_OK, ""};
    moec_st_index ix = {0};
    moec_status st = moec_st_parse(&ix, data, size, file_size, "input", &err);
    if (st == MOEC_OK) {
        check_entries(&ix, file_size);
        check_round_trip(&ix, file_size - ix.data_at);
    } else {
        check(st == MOEC_EFORMAT && err.code == st && err.text[0] != '\0' && !strchr(err.text, '\n'));
    }
    moec_st_index_release(&ix);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    /* The whole file; and the header alone of a file whose data the last shape or offset asks for. */
    parse(data, size, size);
    uint64_t header = 0;
    for (size_t i = 0; i < 8 && size >= 8; i++)
        header |= (uint64_t)data[i] << (8 * i);
    if (size >= 8 && header <= size - 8) {
        static const uint64_t lengths[] = {0, 8, 16, 24, 32, 40, 48, 64, 128, UINT64_C(1) << 40};
        for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++)
            parse(data, 8 + (size_t)header, 8 + header + lengths[i]);
    }
    return 0;
}
