//! Which sequences of a step begin alike, so that it reads that part of their past
//! once for several of them.

use crate::attention::{BLOCK, SharedPrefix};
use crate::generation::Sequence;

/// Sequences that share what the first of them has.
struct Group<'a> {
    slot: usize,
    first: &'a Sequence,
    n: usize,
    /// What all of them share, once there are several.
    len: usize,
}

impl Group<'_> {
    /// Positions that need not be read.
    fn saved(n: usize, len: usize) -> usize {
        (n - 1) * len
    }

    /// What joining with so much in common would save more.
    fn gain(&self, common: usize) -> Option<usize> {
        let len = self.len.min(common);
        let gain = Self::saved(self.n + 1, len).checked_sub(Self::saved(self.n, self.len))?;
        (len >= BLOCK && gain > 0).then_some(gain)
    }
}

/// For each slot the first sequence of the group where it saves most. In the same
/// past there are the same keys and values: they depend on nothing else.
pub(super) fn prefixes(slots: &[Option<Sequence>]) -> Vec<SharedPrefix> {
    let mut groups: Vec<Group<'_>> = Vec::new();
    let mut prefixes = Vec::with_capacity(slots.len());
    for (slot, sequence) in slots.iter().enumerate() {
        let mut prefix = SharedPrefix { of: slot, len: 0 };
        if let Some(sequence) = sequence {
            let gains = groups.iter_mut().filter_map(|group| {
                let common = group.first.n_shared(sequence);
                Some((group.gain(common)?, common, group))
            });
            if let Some((_, common, group)) = gains.max_by_key(|(gain, ..)| *gain) {
                group.n += 1;
                group.len = group.len.min(common);
                prefix = SharedPrefix {
                    of: group.slot,
                    len: common,
                };
            } else {
                groups.push(Group {
                    slot,
                    first: sequence,
                    n: 1,
                    len: sequence.n_fed(),
                });
            }
        }
        prefixes.push(prefix);
    }
    prefixes
}
