//! A gRPC batch-processing worker that serves ImageGPT through ONNX Runtime.
//!
//! A request is one value moving down a line. Each stage is a file, and only
//! neighbors know each other:
//!
//! ```text
//!            async runtime          │        named threads
//!                                   │
//!   client ─▶ rpc ─▶ admission ─────┼─▶ preprocess ─▶ batcher ◀─slot─ engine
//!              ▲                    │       │            └──batch──▶    │
//!              └──────── reply ◀────┼───────┴───────────────────────────┘
//! ```
//!
//! `ARCHITECTURE.md` has the invariants and the reasons.

// Each folder uses only those above it; `tests/architecture.rs` holds that.
mod files;
mod sync;
pub mod telemetry;

pub mod kernels;

pub mod imaging;

pub mod gpu;

pub mod proto;

pub mod model;

pub mod runtime;

pub mod compile;

pub mod engine;

pub mod serve;

pub mod client;

pub mod commands;
