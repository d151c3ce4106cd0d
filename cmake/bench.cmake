# SPDX-License-Identifier: MIT
# Micro-benchmarks of inner parts: one program per *_bench.c of bench/, with the
# inner symbols of the static library.
file(GLOB ep_benches CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/bench/*_bench.c)
foreach(source IN LISTS ep_benches)
  get_filename_component(name ${source} NAME_WE)
  add_executable(${name} ${source})
  target_link_libraries(${name} PRIVATE ep_options entrepot_static)
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR}/src)
endforeach()
