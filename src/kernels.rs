//! Pure arithmetic on the CPU: attention, the layers of a step, and the vectors that
//! both are written in.

pub mod attention;
pub mod layers;
pub(crate) mod vector;
