//! imagegpt-worker.

pub mod attention;
pub mod attention_op;
