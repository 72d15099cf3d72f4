//! A gRPC batch-processing worker that serves ImageGPT through ONNX Runtime.
//!
//! A request moves through a line of stages. Each stage is a file and knows
//! only its neighbors:
//!
//! ```text
//!            async runtime          │        named threads
//!                                   │
//!   client ─▶ rpc ─▶ admission ─────┼─▶ preprocess ─▶ batcher ◀─slot─ engine
//!              ▲                    │       │            └──batch──▶    │
//!              └──────── reply ◀────┼───────┴───────────────────────────┘
//! ```
//!
//! `ARCHITECTURE.md` has the invariants and their reasons.

// Each module uses only modules above it; `tests/architecture.rs` checks this
// order.
mod excerpt;
mod files;
mod nearest;
mod sync;
pub mod telemetry;

pub mod kernels;

pub mod probe;

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
