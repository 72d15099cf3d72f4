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

pub mod error;
pub mod generation;
pub mod job;

pub mod admission;
pub mod batcher;
pub mod engine;
pub mod preprocess;
pub mod rpc;

pub mod attention;
pub mod cache;
pub mod compile;
pub mod config;
pub mod gpu;
pub mod head;
pub mod http;
pub mod layers;
pub mod local;
pub mod metrics;
pub mod model;
pub mod output;
pub mod picture;
pub mod proto;
pub mod readiness;
mod sync;
pub mod telemetry;
mod vector;
pub mod worker;

pub mod bench;
pub mod cli;
pub mod commands;
pub mod dataset;
pub mod doctor;
mod files;
pub mod neighbors;
