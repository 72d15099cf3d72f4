//! Pure arithmetic on the CPU: attention, the layers of a step, and the vectors
//! with which both are written.

pub mod attention;
pub mod layers;
pub(crate) mod vector;
