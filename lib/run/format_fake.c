/* W' where W was: the model's own names, layout and number format, to which W' is rounded once more. What every client loads, and the
 * twin that the other formats are held against. */
#include "run/format_parts.h"

const moec_qformat moec__format_fake = {
    .name = "fake",
    .about = "the quantized values in the model's own number format: not smaller, for measuring",
    .loads = "whatever loads the model",
    .widths = 0x1fe, /* 1 to 8 */
    .grain = MOEC_WIDTHS_PROJECTION,
    .zeros = true,
    .dense = true,
    .scale_type = MOEC_F32,
    .row_multiple = 1,
    .col_multiple = 1,
    .group_multiple = 8, /* unless fewer are asked for: see moec_qformat_grid */
};
