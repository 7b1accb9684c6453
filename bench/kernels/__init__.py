"""`microvlm-bench kernels`: the operators of the table inside ONNX Runtime, against ONNX Runtime's own quantised paths.

formats     one contender's bytes of a matrix, its node, and its product in numpy
workload    shapes, batches, threads and regimes: what is measured
graphs      an ONNX file with many copies of a shape
sessions    a contender ready to run at one setting
measure     interleaved rounds
document    rows, bars and provenance
tables      the document as tables
"""
