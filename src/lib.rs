//! A gRPC batch-processing worker that serves ImageGPT through ONNX Runtime.

pub mod compile;
