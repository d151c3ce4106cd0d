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

# The traditional path over MPI that `bench ep --baseline mpi` compares with; a
# program of its own, so that the command needs no MPI. Not under sanitizers, which
# would judge the MPI library.
if(NOT EP_MPI STREQUAL "OFF" AND EP_SANITIZE STREQUAL "")
  find_package(MPI QUIET COMPONENTS C)
  if(MPI_C_FOUND AND MPIEXEC_EXECUTABLE)
    file(GLOB ep_mpi_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/bench/mpi_*.c)
    add_executable(entrepot_mpi_baseline ${ep_mpi_sources})
    set_target_properties(entrepot_mpi_baseline PROPERTIES OUTPUT_NAME entrepot-mpi-baseline)
    target_link_libraries(entrepot_mpi_baseline PRIVATE entrepot_apps entrepot MPI::MPI_C)
    set(ep_is_open_mpi 0)
    if(MPI_C_LIBRARY_VERSION_STRING MATCHES "Open MPI" OR MPI_C_LIBRARIES MATCHES "openmpi")
      set(ep_is_open_mpi 1)
    endif()
    set_source_files_properties(${PROJECT_SOURCE_DIR}/apps/bench_baseline.c PROPERTIES
      COMPILE_DEFINITIONS "EP_MPIEXEC=\"${MPIEXEC_EXECUTABLE}\";EP_MPI_IS_OPEN_MPI=${ep_is_open_mpi}")
  elseif(EP_MPI STREQUAL "ON")
    message(FATAL_ERROR "EP_MPI is ON, but MPI was not found (Debian: libopenmpi-dev)")
  endif()
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
