"""Float32 on CPUs, as fast as they allow.

linear.py           linear layers and experts with packed weights
packed_matmul.py    products with many packed weights in one call, by a kernel of our own (packed_matmul.cpp)
hugepages.py        the process's memory in huge pages
openmp.py           OpenMP's threads, given back by a thread that has finished computing
"""
