/* SPDX-License-Identifier: MIT */
/* Operations as text. */
#include "base/error.h"
#include "plan/schedule.h"

#include <stdio.h>
#include <string.h>

static const char letters[] = {[EP_OP_FORWARD] = 'F',
                               [EP_OP_BACKWARD] = 'B',
                               [EP_OP_INPUT_GRAD] = 'I',
                               [EP_OP_WEIGHT_GRAD] = 'W'};

void epi_op_text(const ep_schedule_op *op, char text[EPI_OP_TEXT_MAX])
{
    const char *what = op->payload == EP_PAYLOAD_ACTIVATION ? "activation" : "gradient";
    if (op->kind == EP_OP_PAIR)
        snprintf(text, EPI_OP_TEXT_MAX, "(F%d.%d+B%d.%d)", op->phase, (int)op->chunk,
                 op->back_phase, (int)op->back_chunk);
    else if (op->kind == EP_OP_SEND)
        snprintf(text, EPI_OP_TEXT_MAX, "send of %s %d.%d to rank %d", what, op->phase,
                 (int)op->chunk, (int)op->peer);
    else if (op->kind == EP_OP_RECV)
        snprintf(text, EPI_OP_TEXT_MAX, "receive of %s %d.%d from rank %d", what, op->phase,
                 (int)op->chunk, (int)op->peer);
    else
        snprintf(text, EPI_OP_TEXT_MAX, "%c%d.%d", letters[op->kind], op->phase, (int)op->chunk);
}

ep_status ep_schedule_format(const ep_schedule *s, int32_t rank, char *text, size_t capacity,
                             size_t *needed)
{
    const ep_schedule_op *ops;
    size_t count, length = 0;
    char one[EPI_OP_TEXT_MAX];
    EPI_TRY(ep_schedule_ops(s, rank, &ops, &count, NULL));
    if (!text && capacity)
        return epi_fail(EP_ERR_ARGUMENT, "ep_schedule_format: text is NULL, capacity %zu",
                        capacity);
    if (capacity)
        text[0] = '\0';
    for (size_t i = 0; i < count; i++) {
        if (ops[i].kind == EP_OP_SEND || ops[i].kind == EP_OP_RECV)
            continue;
        epi_op_text(&ops[i], one);
        const char *gap = length ? " " : "";
        size_t size = strlen(gap) + strlen(one);
        if (length + size < capacity)
            snprintf(text + length, capacity - length, "%s%s", gap, one);
        length += size;
    }
    if (needed)
        *needed = length + 1;
    if (text && capacity < length + 1)
        return epi_fail(EP_ERR_CAPACITY, "ep_schedule_format: capacity is %zu; rank %d takes %zu",
                        capacity, (int)rank, length + 1);
    return EP_OK;
}
