/* SPDX-License-Identifier: MIT */
#include "ep/args.h"
#include "support/test.h"

/* Memory of another GPU is not reachable as a buffer's own is; on the CPU there is one device. */
static void tensors_lie_on_the_buffers_device(void **state)
{
    (void)state;
    float memory[8];
    ep_tensor tensor = ep_tensor_2d(memory, EP_F32, 2, 4);
    epi_tensor_rule rule = {.call = "ep_call",
                            .argument = "x",
                            .ndim = 2,
                            .rows = 2,
                            .columns = 4,
                            .dtypes = 1u << EP_F32,
                            .dtype_names = "F32",
                            .device = EP_DEVICE_CUDA,
                            .device_index = 3};
    assert_int_equal(epi_tensor_check(&tensor, &rule), EP_ERR_ARGUMENT);
    assert_string_equal(ep_last_error(), "ep_call: x.device is 0; it must be 1 as the buffer's");
    tensor.device = EP_DEVICE_CUDA;
    tensor.device_index = 1;
    assert_int_equal(epi_tensor_check(&tensor, &rule), EP_ERR_ARGUMENT);
    assert_string_equal(ep_last_error(),
                        "ep_call: x.device_index is 1; it must be 3 as the buffer's");
    tensor.device_index = 3;
    assert_int_equal(epi_tensor_check(&tensor, &rule), EP_OK);
    tensor.device = rule.device = EP_DEVICE_CPU;
    tensor.device_index = 1;
    assert_int_equal(epi_tensor_check(&tensor, &rule), EP_OK);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(tensors_lie_on_the_buffers_device)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
