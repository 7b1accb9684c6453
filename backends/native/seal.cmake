# Appends the SHA-256 of a library to it: cmake -DLIBRARY=FILE -P seal.cmake. library_file.py reads the seal before it
# loads the library. The system's loader ignores bytes after the last section.
file(SHA256 "${LIBRARY}" digest)
file(APPEND "${LIBRARY}" "\nMicroVLM library sealed with sha256 ${digest}\n")
