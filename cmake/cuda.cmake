# SPDX-License-Identifier: MIT
# libentrepot_cuda: a module that the library opens at run time. EP_CUDA AUTO
# builds it where nvcc is found, ON demands it, OFF leaves it out.
include(GNUInstallDirs)
if(EP_CUDA STREQUAL "OFF")
  return()
endif()
if(EP_SANITIZE) # sanitizers know nothing of device memory
  message(STATUS "CUDA module: left out, EP_SANITIZE is '${EP_SANITIZE}'")
  return()
endif()
find_program(EP_NVCC nvcc PATHS /usr/local/cuda/bin $ENV{CUDA_HOME}/bin)
if(NOT EP_NVCC)
  if(EP_CUDA STREQUAL "ON")
    message(FATAL_ERROR "EP_CUDA is ON and nvcc was not found; EP_NVCC can name it")
  endif()
  message(STATUS "CUDA module: left out, nvcc was not found")
  return()
endif()
get_filename_component(ep_cuda_bin ${EP_NVCC} REALPATH)
get_filename_component(ep_cuda_bin ${ep_cuda_bin} DIRECTORY)
get_filename_component(ep_cuda_home ${ep_cuda_bin} DIRECTORY)
find_library(EP_CUDART cudart_static PATHS ${ep_cuda_home} PATH_SUFFIXES lib64 targets/x86_64-linux/lib)
find_path(EP_CUDA_INCLUDE cuda_runtime_api.h PATHS ${ep_cuda_home} PATH_SUFFIXES include targets/x86_64-linux/include)
if(NOT EP_CUDART OR NOT EP_CUDA_INCLUDE)
  if(EP_CUDA STREQUAL "ON")
    message(FATAL_ERROR "EP_CUDA is ON; libcudart_static or cuda_runtime_api.h was not found in ${ep_cuda_home}")
  endif()
  message(STATUS "CUDA module: left out, libcudart_static or cuda_runtime_api.h was not found in ${ep_cuda_home}")
  return()
endif()

# Machine code for SM80 and SM90, and PTX that newer devices compile. No contraction: results are
# the bits of the CPU path, which contracts nothing either.
set(ep_cuda_flags -std=c++17 -O3 -fmad=false -Xcompiler=-fPIC,-fvisibility=hidden,-fno-exceptions,-fno-threadsafe-statics
  -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90,code=[sm_90,compute_90])
file(GLOB ep_cuda_kernels CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/*/cuda/*.cu)
file(GLOB ep_cuda_headers CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/*/cuda/*.cuh
  ${PROJECT_SOURCE_DIR}/src/*/cuda/*.h ${PROJECT_SOURCE_DIR}/src/codec/*.h)
set(ep_cuda_objects "")
foreach(source IN LISTS ep_cuda_kernels)
  get_filename_component(name ${source} NAME_WE)
  set(object ${CMAKE_BINARY_DIR}/cuda/${name}.o)
  add_custom_command(OUTPUT ${object}
    COMMAND ${CMAKE_COMMAND} -E make_directory ${CMAKE_BINARY_DIR}/cuda
    COMMAND ${EP_NVCC} ${ep_cuda_flags} -I${PROJECT_SOURCE_DIR}/src -I${PROJECT_SOURCE_DIR}/include
      -c ${source} -o ${object}
    DEPENDS ${source} ${ep_cuda_headers} COMMENT "CUDA kernels ${name}" VERBATIM)
  list(APPEND ep_cuda_objects ${object})
endforeach()

file(GLOB ep_cuda_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/*/cuda/*.c
  ${PROJECT_SOURCE_DIR}/src/transport/cuda_ipc/*.c)
list(FILTER ep_cuda_sources EXCLUDE REGEX "_test\\.c$")
add_library(entrepot_cuda MODULE ${ep_cuda_sources} ${PROJECT_SOURCE_DIR}/src/base/tensor.c ${ep_cuda_objects})
set_source_files_properties(${ep_cuda_objects} PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)
target_include_directories(entrepot_cuda PRIVATE ${PROJECT_SOURCE_DIR}/src)
target_include_directories(entrepot_cuda SYSTEM PRIVATE ${EP_CUDA_INCLUDE})
target_link_libraries(entrepot_cuda PRIVATE ep_options ${EP_CUDART} Threads::Threads ${CMAKE_DL_LIBS} rt)
target_link_options(entrepot_cuda PRIVATE -Wl,--version-script=${PROJECT_SOURCE_DIR}/cmake/module.map -Wl,-z,defs)
install(TARGETS entrepot_cuda LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
