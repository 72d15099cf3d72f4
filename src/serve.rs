//! Worker: each request is one value that passes through a line of stages, from
//! the gRPC surface to the engine's thread and back. Only [`worker`] knows all
//! stages.

pub(crate) mod admission;
pub(crate) mod batcher;
pub(crate) mod cache;
pub(crate) mod caller;
pub(crate) mod capacity;
pub mod config;
pub mod devices;
pub(crate) mod engine_thread;
pub mod engines;
pub(crate) mod error;
pub(crate) mod fair;
pub(crate) mod generate;
pub(crate) mod handoff;
pub mod heads;
pub(crate) mod host;
pub(crate) mod http;
pub(crate) mod job;
pub mod metrics;
pub(crate) mod preprocess;
pub(crate) mod readiness;
pub(crate) mod rpc;
pub(crate) mod sample;
pub(crate) mod sequence;
pub(crate) mod timeline;
pub(crate) mod trace;
pub mod worker;
