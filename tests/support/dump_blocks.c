/* dump_blocks TYPE N write|weighted|read: rows of N values on stdin come back on stdout, so that a client in Python can compare.
 *     write      float32 values -> blocks
 *     weighted   the first row is the importance of the columns of the others
 *     read       blocks -> float32 values */
#include "num/blocks.h"

#include "base/mem.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(int argc, char **argv)
{
    moec_err err = {MOEC_OK, ""};
    float *row = NULL, *importance = NULL;
    unsigned char *bytes = NULL;
    if (argc != 4)
        return 2;
    const moec_block type = moec_blocks_find(argv[1]);
    const int64_t n = atoll(argv[2]), size = moec_blocks_bytes(type, n);
    const bool read = strcmp(argv[3], "read") == 0, weighted = strcmp(argv[3], "weighted") == 0;
    bool good = n > 0 && size > 0 && MOEC_NEW(row, (size_t)n, &err) == MOEC_OK &&
                MOEC_NEW(importance, (size_t)n, &err) == MOEC_OK && MOEC_NEW(bytes, (size_t)size, &err) == MOEC_OK &&
                (!weighted || fread(importance, sizeof *importance, (size_t)n, stdin) == (size_t)n);
    while (good && fread(read ? (void *)bytes : row, read ? (size_t)size : (size_t)n * sizeof *row, 1, stdin) == 1)
        if (read)
            good = moec_blocks_read(row, bytes, n, type, &err) == MOEC_OK && fwrite(row, (size_t)n * sizeof *row, 1, stdout) == 1;
        else
            good = moec_blocks_write(bytes, row, weighted ? importance : NULL, n, type, &err) == MOEC_OK &&
                   fwrite(bytes, (size_t)size, 1, stdout) == 1;
    moec_free(row);
    moec_free(importance);
    moec_free(bytes);
    if (!good)
        fprintf(stderr, "dump_blocks: %s\n", err.text);
    return good ? 0 : 1;
}
