//! Priorities of calls, by their names in metadata.

/// How urgent a call is. Ordered by urgency.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// Somebody waits for the answer: goes first.
    Interactive,
    /// A job over many images: fills what is left, and gets its share of the
    /// engine when there is nothing left.
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
