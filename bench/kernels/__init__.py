"""`microvlm-bench kernels`: the operators of the table inside ONNX Runtime, against ONNX Runtime's own quantised paths.

contender_formats  a contender's bytes of a matrix, its node, and its product in numpy
contenders         the named contenders, and which run here
workload           shapes, batches, threads and regimes: what is measured
kernel_graphs      an ONNX file with many copies of a shape
sessions           a contender ready to run at one setting
product_check      a contender's product against numpy's, before it is timed
measure, timing    interleaved rounds
kernel_document    rows, bars and provenance
kernel_tables      the document as tables
cortex_a53         the ARM kernels' loops in a simulator
"""
