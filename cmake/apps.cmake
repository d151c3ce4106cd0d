# SPDX-License-Identifier: MIT
# The entrepot command (apps/*.c) and one program per file of examples/.
find_package(PkgConfig)
if(PkgConfig_FOUND)
  pkg_check_modules(cjson IMPORTED_TARGET libcjson)
endif()

# Everything but main.c is a library, which the tests of apps/ and test/cli/ and
# the MPI baseline use too. It leaves the choice of libentrepot to them.
file(GLOB ep_app_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/apps/*.c)
list(FILTER ep_app_sources EXCLUDE REGEX "(_test|/main)\\.c$")
add_library(entrepot_apps STATIC ${ep_app_sources})
target_link_libraries(entrepot_apps PUBLIC ep_options)
target_include_directories(entrepot_apps PUBLIC ${PROJECT_SOURCE_DIR}/apps)
if(cjson_FOUND)
  target_link_libraries(entrepot_apps PRIVATE PkgConfig::cjson)
  target_compile_definitions(entrepot_apps PRIVATE EP_HAVE_CJSON=1)
endif()

add_executable(entrepot_command ${PROJECT_SOURCE_DIR}/apps/main.c)
set_target_properties(entrepot_command PROPERTIES OUTPUT_NAME entrepot)
target_link_libraries(entrepot_command PRIVATE entrepot_apps entrepot)

file(GLOB ep_examples CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/examples/*.c)
foreach(source IN LISTS ep_examples)
  get_filename_component(name ${source} NAME_WE)
  add_executable(example_${name} ${source})
  target_link_libraries(example_${name} PRIVATE ep_options entrepot)
endforeach()
