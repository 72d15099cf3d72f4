//! The worker: a request is one value moving down a line, from the gRPC surface to
//! the engine's thread and back. Only [`worker`] knows all stages.

pub mod admission;
pub mod batcher;
pub mod cache;
pub mod capacity;
pub mod config;
pub mod devices;
pub(crate) mod engine_thread;
pub mod error;
pub mod generate;
pub(crate) mod handoff;
pub mod http;
pub mod job;
pub mod metrics;
pub mod preprocess;
pub mod readiness;
pub mod rpc;
pub mod sample;
pub mod sequence;
pub mod worker;
