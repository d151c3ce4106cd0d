# SPDX-License-Identifier: MIT
# One program per *_test.c, beside its source or under test/<kind>/. Its CTest
# label is the folder under test/, or "unit". Lines in the file's first comment:
# "ctest-timeout: N" sets the limit in seconds, "ctest-label: NAME" adds a label (serial:
# runs alone; plain, noasan, notsan: see tools/test.sh),
# "ctest-wrap: FUNCTION..." links calls of FUNCTION to the test's __wrap_FUNCTION.
find_package(PkgConfig REQUIRED)
pkg_check_modules(cmocka REQUIRED IMPORTED_TARGET cmocka)

file(GLOB_RECURSE ep_tests CONFIGURE_DEPENDS
  ${PROJECT_SOURCE_DIR}/src/*_test.c ${PROJECT_SOURCE_DIR}/apps/*_test.c ${PROJECT_SOURCE_DIR}/test/*_test.c)
file(GLOB ep_test_support CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/test/support/*.c)

# The CUDA module's host code over a device that only pretends (test/support/fake_gpu.h).
file(GLOB ep_fake_gpu CONFIGURE_DEPENDS
  ${PROJECT_SOURCE_DIR}/src/ep/cuda/*.c ${PROJECT_SOURCE_DIR}/test/support/fake_gpu/*.c)
list(FILTER ep_fake_gpu EXCLUDE REGEX "_test\\.c$")
add_library(fake_gpu MODULE ${ep_fake_gpu}
  ${PROJECT_SOURCE_DIR}/src/device/cuda/entry.c ${PROJECT_SOURCE_DIR}/src/base/tensor.c)
target_link_libraries(fake_gpu PRIVATE ep_options)
target_include_directories(fake_gpu PRIVATE ${PROJECT_SOURCE_DIR}/src ${PROJECT_SOURCE_DIR}/test)
# Its fences order words between processes, of which TSan knows nothing.
target_compile_options(fake_gpu PRIVATE $<$<C_COMPILER_ID:GNU>:-Wno-tsan>)
target_link_options(fake_gpu PRIVATE
  -Wl,--version-script=${PROJECT_SOURCE_DIR}/test/support/fake_gpu/module.map)

# What a CUDA module can be like that is of no use.
add_library(broken_module MODULE ${PROJECT_SOURCE_DIR}/test/support/broken_module/module.c)
target_link_libraries(broken_module PRIVATE ep_options)
target_include_directories(broken_module PRIVATE ${PROJECT_SOURCE_DIR}/src)

# Inputs and reference are made before the ranks start; sanitizers would only slow that down.
if(NOT EP_SANITIZE STREQUAL "")
  foreach(source IN LISTS ep_test_support)
    if(source MATCHES "/support/(formats|random|reference|reference_combine|scenario_build)\\.c$")
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "-fno-sanitize=all;-O2")
    endif()
  endforeach()
endif()
if(ep_test_support)
  add_library(ep_test_support STATIC ${ep_test_support})
  target_link_libraries(ep_test_support PUBLIC ep_options entrepot_static PkgConfig::cmocka)
  target_include_directories(ep_test_support PUBLIC ${PROJECT_SOURCE_DIR}/src ${PROJECT_SOURCE_DIR}/test)
  target_compile_definitions(ep_test_support PRIVATE
    EP_TEST_DATA="${PROJECT_SOURCE_DIR}/../shared/data" EP_COMMAND="${CMAKE_BINARY_DIR}/bin/entrepot"
    EP_FAKE_GPU="$<TARGET_FILE:fake_gpu>")
  add_dependencies(ep_test_support fake_gpu broken_module)
endif()

foreach(source IN LISTS ep_tests)
  get_filename_component(name ${source} NAME_WE)
  file(RELATIVE_PATH path ${PROJECT_SOURCE_DIR} ${source})
  string(REGEX MATCH "^test/([a-z]+)/" found ${path})
  set(label unit)
  if(found)
    set(label ${CMAKE_MATCH_1})
  endif()
  file(STRINGS ${source} notes REGEX "ctest-(timeout|label|wrap):" LIMIT_COUNT 8)
  set(timeout 120)
  set(wraps "")
  foreach(note IN LISTS notes)
    if(note MATCHES "ctest-timeout: ([0-9]+)")
      set(timeout ${CMAKE_MATCH_1})
    elseif(note MATCHES "ctest-label: ([a-z]+)")
      list(APPEND label ${CMAKE_MATCH_1})
    elseif(note MATCHES "ctest-wrap: ([a-z0-9_ ]+)")
      string(STRIP "${CMAKE_MATCH_1}" names)
      string(REPLACE " " ";" names "${names}")
      list(APPEND wraps ${names})
    endif()
  endforeach()
  add_executable(${name} ${source})
  target_compile_definitions(${name} PRIVATE
    EP_TEST_DATA="${PROJECT_SOURCE_DIR}/../shared/data" EP_SOURCE_DIR="${PROJECT_SOURCE_DIR}"
    EP_COMMAND="${CMAKE_BINARY_DIR}/bin/entrepot" EP_BINARY_DIR="${CMAKE_BINARY_DIR}")
  if(path MATCHES "^apps/|^test/(cli|fuzz)/")
    target_link_libraries(${name} PRIVATE entrepot_apps)
  endif()
  target_link_libraries(${name} PRIVATE ep_options entrepot_static PkgConfig::cmocka)
  if(TARGET ep_test_support)
    target_link_libraries(${name} PRIVATE ep_test_support)
  endif()
  if(cjson_FOUND)
    target_link_libraries(${name} PRIVATE PkgConfig::cjson)
    target_compile_definitions(${name} PRIVATE EP_HAVE_CJSON=1)
  endif()
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR}/src ${PROJECT_SOURCE_DIR}/test)
  list(TRANSFORM wraps PREPEND "-Wl,--wrap=")
  target_link_options(${name} PRIVATE ${wraps})
  if(EP_LIBFUZZER AND label STREQUAL "fuzz")
    target_compile_definitions(${name} PRIVATE EP_LIBFUZZER=1)
    target_link_options(${name} PRIVATE -fsanitize=fuzzer)
    continue()
  endif()
  add_test(NAME ${name} COMMAND ${name})
  set_tests_properties(${name} PROPERTIES LABELS "${label}" TIMEOUT ${timeout})
  if("serial" IN_LIST label)
    set_tests_properties(${name} PROPERTIES RUN_SERIAL TRUE)
  endif()
endforeach()

# House rules that must hold before anything else makes sense.
if(EP_SANITIZE STREQUAL "")
  add_test(NAME check_includes COMMAND ${PROJECT_SOURCE_DIR}/tools/check_includes.sh)
  add_test(NAME check_includes_self_test COMMAND ${PROJECT_SOURCE_DIR}/tools/check_includes.sh --self-test)
  add_test(NAME check_headers COMMAND ${PROJECT_SOURCE_DIR}/tools/check_headers.sh)
  add_test(NAME check_symbols COMMAND ${PROJECT_SOURCE_DIR}/tools/check_symbols.sh $<TARGET_FILE:entrepot>)
  add_test(NAME check_style COMMAND ${PROJECT_SOURCE_DIR}/tools/check_style.sh)
  set_tests_properties(check_includes check_includes_self_test check_headers check_symbols
    check_style    PROPERTIES LABELS source)
  add_test(NAME configure_test COMMAND ${PROJECT_SOURCE_DIR}/test/cli/configure_test.sh ${PROJECT_SOURCE_DIR})
  set_tests_properties(configure_test PROPERTIES LABELS cli)
  if(EP_BUILD_APPS)
    add_test(NAME mps_test COMMAND ${PROJECT_SOURCE_DIR}/test/cli/mps_test.sh $<TARGET_FILE:entrepot_command>
      $<TARGET_FILE:fake_gpu>)
    set_tests_properties(mps_test PROPERTIES LABELS cli)
    add_test(NAME install_test COMMAND ${PROJECT_SOURCE_DIR}/test/cli/install_test.sh
      ${PROJECT_SOURCE_DIR} ${PROJECT_BINARY_DIR})
    set_tests_properties(install_test PROPERTIES LABELS cli TIMEOUT 300)
  endif()
endif()
