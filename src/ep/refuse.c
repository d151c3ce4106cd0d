/* SPDX-License-Identifier: MIT */
/* Calls that the caller itself gives up before it makes them. */
#include "ep/backend.h"
#include "ep/buffer.h"

#include "base/error.h"

static const char *const names[] = {
    [EP_CALL_DISPATCH] = "ep_dispatch",
    [EP_CALL_COMBINE] = "ep_combine",
    [EP_CALL_DISPATCH_BACKWARD] = "ep_dispatch_backward",
    [EP_CALL_COMBINE_BACKWARD] = "ep_combine_backward",
    [EP_CALL_LL_DISPATCH] = "ep_ll_dispatch",
    [EP_CALL_LL_COMBINE] = "ep_ll_combine",
};

ep_status ep_buffer_refuse(ep_buffer *buffer, ep_call call, const char *reason)
{
    const char *refuse = "ep_buffer_refuse";
    if (!buffer || !reason)
        return epi_fail(EP_ERR_ARGUMENT, "%s: %s is NULL", refuse, buffer ? "reason" : "buffer");
    if ((unsigned)call > EP_CALL_LL_COMBINE)
        return epi_fail(EP_ERR_ARGUMENT, "%s: call is %d; it must be 0..%d (ep_call)", refuse,
                        (int)call, (int)EP_CALL_LL_COMBINE);
    ep_status status =
        epi_fail(EP_ERR_STATE, "%s: refused by the caller: %.400s", names[call], reason);
    epi_reject(buffer, names[call], status);
    return EP_OK;
}
