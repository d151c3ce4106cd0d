# SPDX-License-Identifier: MIT
# libentrepot: every *.c under src/ that is not a test. A room is a folder; a new
# file needs no entry here.
file(GLOB_RECURSE ep_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/*.c)
list(FILTER ep_sources EXCLUDE REGEX "_test\\.c$")
# The CUDA module has its own list, cmake/cuda.cmake.
list(FILTER ep_sources EXCLUDE REGEX "/src/[a-z]+/cuda(_ipc)?/")
if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  list(FILTER ep_sources EXCLUDE REGEX "_avx(2|512)\\.c$")
endif()
ep_simd_flags(${ep_sources})

# Compiled once; tests link the static form, whose inner symbols they can reach.
add_library(entrepot_objects OBJECT ${ep_sources})
target_link_libraries(entrepot_objects PUBLIC ep_options)
target_include_directories(entrepot_objects PUBLIC ${PROJECT_SOURCE_DIR}/src)

add_library(entrepot SHARED $<TARGET_OBJECTS:entrepot_objects>)
set_target_properties(entrepot PROPERTIES VERSION ${PROJECT_VERSION} SOVERSION 0)
target_include_directories(entrepot PUBLIC
  $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include> $<INSTALL_INTERFACE:include>)
target_link_libraries(entrepot PRIVATE Threads::Threads m ${CMAKE_DL_LIBS})
target_link_options(entrepot PRIVATE
  -Wl,--version-script=${PROJECT_SOURCE_DIR}/cmake/entrepot.map)
set_property(TARGET entrepot APPEND PROPERTY LINK_DEPENDS ${PROJECT_SOURCE_DIR}/cmake/entrepot.map)

add_library(entrepot_static STATIC $<TARGET_OBJECTS:entrepot_objects>)
set_target_properties(entrepot_static PROPERTIES OUTPUT_NAME entrepot)
target_link_libraries(entrepot_static PUBLIC Threads::Threads m ${CMAKE_DL_LIBS})
target_include_directories(entrepot_static PUBLIC
  $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include> $<INSTALL_INTERFACE:include>)
