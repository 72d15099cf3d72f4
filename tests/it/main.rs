//! Tests of the whole worker over its sockets.
//!
//! They are one binary, because linking ONNX Runtime's bindings and tonic once
//! is cheaper than once per file.

#![warn(clippy::disallowed_methods)]
#![expect(
    clippy::float_cmp,
    reason = "counts in metrics are whole numbers, and the fake engine is exact"
)]

mod access;
mod authority;
mod bad_input;
mod batching;
mod bench;
mod bench_engine;
mod bench_stub;
mod callers;
mod commands;
mod compiled;
mod devices;
mod doctor;
mod embed;
mod emoji;
mod engine_faults;
mod generate;
mod gpu;
mod harness;
mod heads;
mod health;
mod hostile;
mod load;
mod metrics;
mod models;
mod not_grpc;
mod oip;
mod playground;
mod pool;
#[path = "../process/mod.rs"]
mod process;
mod provider;
mod scheduling;
mod scripts;
mod shutdown;
mod stdio;
mod stream;
mod traces;
mod web;
