# Fails if an object compiled for one instruction set defines anything but its table of kernels: a function
# that other objects define too would be merged with theirs, and might run where its instructions do not exist.
# Usage: cmake -DNM=... -DOBJECTS=a.o;b.o -P symbols.cmake

foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} --defined-only --extern-only ${object} OUTPUT_VARIABLE symbols
                  COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^ \n]+\n" names "${symbols}")
  list(LENGTH names count)
  if(NOT count EQUAL 1 OR NOT names MATCHES "k_avx")
    message(SEND_ERROR "${object} defines more than its table of kernels:\n${symbols}")
  endif()
endforeach()
