/* Writes the small checkpoint that tests/unit/test_families.c runs, for comparison with another implementation.
 *
 *   write_tiny FAMILY DIR     FAMILY: model_type of a row of the table
 *   write_tiny                lists them */
#include "tiny.h"

#include <stdio.h>

int main(int argc, char **argv)
{
    moec_err err = {MOEC_OK, ""};
    if (argc == 1) {
        for (int i = 0; moec_family_at(i); i++)
            printf("%s\n", moec_family_at(i)->model_type);
        return 0;
    }
    if (argc != 3) {
        fprintf(stderr, "usage: write_tiny [FAMILY DIR]\n");
        return 2;
    }
    const tiny_spec spec = tiny_of(argv[1]);
    moec_status st = tiny_write(argv[2], &spec, &err);
    if (st != MOEC_OK)
        fprintf(stderr, "write_tiny: %s\n", err.text);
    return moec_exit_code(st);
}
