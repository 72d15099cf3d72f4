//! Priority classes of calls, by their names in metadata.

/// Priority class of a call. Ordered by urgency, the most urgent first.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// Call for whose answer somebody waits; it is run first.
    Interactive,
    /// Job over many images; it runs in the time that interactive work leaves,
    /// and gets at least --bulk-share of the engine's time.
    Bulk,
}

impl Priority {
    pub const ALL: [Self; 2] = [Self::Interactive, Self::Bulk];

    /// The class's name in metadata, metrics and logs.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Interactive => "interactive",
            Self::Bulk => "bulk",
        }
    }
}
