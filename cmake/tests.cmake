# SPDX-License-Identifier: MIT
# One program per *_test.c, beside its source or under test/<kind>/. Its CTest
# label is the folder under test/, or "unit". A line "ctest-timeout: N" or
# "ctest-label: NAME" in the file's first comment sets the limit in seconds or
# adds a label.
find_package(PkgConfig REQUIRED)
pkg_check_modules(cmocka REQUIRED IMPORTED_TARGET cmocka)

file(GLOB_RECURSE ep_tests CONFIGURE_DEPENDS
  ${PROJECT_SOURCE_DIR}/src/*_test.c ${PROJECT_SOURCE_DIR}/apps/*_test.c ${PROJECT_SOURCE_DIR}/test/*_test.c)
file(GLOB ep_test_support CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/test/support/*.c)
if(ep_test_support)
  add_library(ep_test_support STATIC ${ep_test_support})
  target_link_libraries(ep_test_support PUBLIC ep_options entrepot_static PkgConfig::cmocka)
  target_include_directories(ep_test_support PUBLIC ${PROJECT_SOURCE_DIR}/src ${PROJECT_SOURCE_DIR}/test)
  target_compile_definitions(ep_test_support PRIVATE EP_TEST_DATA="${PROJECT_SOURCE_DIR}/../shared/data")
endif()

foreach(source IN LISTS ep_tests)
  get_filename_component(name ${source} NAME_WE)
  file(RELATIVE_PATH path ${PROJECT_SOURCE_DIR} ${source})
  string(REGEX MATCH "^test/([a-z]+)/" found ${path})
  set(label unit)
  if(found)
    set(label ${CMAKE_MATCH_1})
  endif()
  file(STRINGS ${source} notes REGEX "ctest-(timeout|label):" LIMIT_COUNT 4)
  set(timeout 120)
  foreach(note IN LISTS notes)
    if(note MATCHES "ctest-timeout: ([0-9]+)")
      set(timeout ${CMAKE_MATCH_1})
    elseif(note MATCHES "ctest-label: ([a-z]+)")
      list(APPEND label ${CMAKE_MATCH_1})
    endif()
  endforeach()
  add_executable(${name} ${source})
  target_compile_definitions(${name} PRIVATE
    EP_TEST_DATA="${PROJECT_SOURCE_DIR}/../shared/data" EP_SOURCE_DIR="${PROJECT_SOURCE_DIR}"
    EP_COMMAND="${CMAKE_BINARY_DIR}/bin/entrepot" EP_BINARY_DIR="${CMAKE_BINARY_DIR}")
  target_link_libraries(${name} PRIVATE ep_options entrepot_static PkgConfig::cmocka)
  if(TARGET ep_test_support)
    target_link_libraries(${name} PRIVATE ep_test_support)
  endif()
  if(cjson_FOUND)
    target_link_libraries(${name} PRIVATE PkgConfig::cjson)
    target_compile_definitions(${name} PRIVATE EP_HAVE_CJSON=1)
  endif()
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR}/src ${PROJECT_SOURCE_DIR}/test)
  add_test(NAME ${name} COMMAND ${name})
  set_tests_properties(${name} PROPERTIES LABELS "${label}" TIMEOUT ${timeout})
endforeach()
