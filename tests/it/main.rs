//! The whole worker, over its sockets.
//!
//! One binary, because linking ONNX Runtime's bindings and tonic once is
//! cheaper than once a file.

mod bad_input;
mod batching;
mod embed;
mod engine_faults;
mod harness;
mod health;
mod load;
mod metrics;
mod models;
mod shutdown;
