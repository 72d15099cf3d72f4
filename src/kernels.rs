//! Pure arithmetic on the CPU: attention, the layers of a step, the layers of
//! whole images, and the vectors with which all are written.

pub mod attention;
pub mod layers;
pub(crate) mod vector;
pub mod whole;
