//! Answers that were given before, if the operator wants them kept.
//!
//! The key is the work itself, tokens and all, and not a hash of it: two
//! pictures can never be taken for one another. A worker serves one model, so
//! the model is not in the key.

use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::sync::{Arc, LazyLock};

use moka::sync::Cache as Moka;

use crate::model::graph::Want;

/// What an entry takes besides its tokens and numbers, roughly: the key, two
/// reference counts, the cache's own book-keeping.
const ENTRY_OVERHEAD_BYTES: usize = 256;

/// Of this process, so that nobody can send images that collide.
static HASHES: LazyLock<RandomState> = LazyLock::new(RandomState::new);

/// Work that has the same answer whoever asks.
#[derive(Debug, Clone)]
pub(crate) struct AnswerKey {
    pub want: Want,
    /// As the model sees them, so the context is in them.
    pub tokens: Arc<[u16]>,
    /// Of both, since the tokens are long and the work is looked up several
    /// times on its way.
    hash: u64,
}

impl AnswerKey {
    #[must_use]
    pub(crate) fn new(want: Want, tokens: Arc<[u16]>) -> Self {
        let hash = HASHES.hash_one((want, &tokens));
        Self { want, tokens, hash }
    }
}

impl PartialEq for AnswerKey {
    fn eq(&self, other: &Self) -> bool {
        (self.hash, self.want) == (other.hash, other.want) && self.tokens == other.tokens
    }
}

impl Eq for AnswerKey {}

impl Hash for AnswerKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
    }
}

/// A bounded cache of answers. Cheap to clone; without a size it keeps
/// nothing.
#[derive(Debug, Clone)]
pub(crate) struct AnswerCache(Option<Moka<AnswerKey, Arc<[f32]>>>);

impl AnswerCache {
    /// A cache of at most about so many bytes; 0 turns it off.
    #[must_use]
    pub(crate) fn new(bytes_max: u64) -> Self {
        Self((bytes_max > 0).then(|| {
            Moka::builder()
                .max_capacity(bytes_max)
                .weigher(|key: &AnswerKey, values: &Arc<[f32]>| {
                    let bytes =
                        size_of_val(&*key.tokens) + size_of_val(&**values) + ENTRY_OVERHEAD_BYTES;
                    u32::try_from(bytes).unwrap_or(u32::MAX)
                })
                .build()
        }))
    }

    /// Whether it keeps anything at all.
    #[must_use]
    pub(crate) fn is_on(&self) -> bool {
        self.0.is_some()
    }

    #[must_use]
    pub(crate) fn get(&self, key: &AnswerKey) -> Option<Arc<[f32]>> {
        self.0.as_ref()?.get(key)
    }

    pub(crate) fn put(&self, key: AnswerKey, values: &[f32]) {
        if let Some(cache) = &self.0 {
            cache.insert(key, values.into());
        }
    }

    /// Bytes that its entries take.
    #[must_use]
    pub(crate) fn bytes(&self) -> u64 {
        self.0.as_ref().map_or(0, |cache| {
            cache.run_pending_tasks();
            cache.weighted_size()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(token: u16, want: Want) -> AnswerKey {
        AnswerKey::new(want, vec![token; 64].into())
    }

    #[test]
    fn an_answer_is_found_by_the_same_work_only() {
        let cache = AnswerCache::new(1 << 20);
        cache.put(key(1, Want::Mean), &[1.0]);
        assert_eq!(cache.get(&key(1, Want::Mean)).as_deref(), Some(&[1.0][..]));
        assert!(cache.get(&key(1, Want::Last)).is_none());
        assert!(cache.get(&key(2, Want::Mean)).is_none());
    }

    #[test]
    fn it_stays_within_its_size() {
        let cache = AnswerCache::new(10_000);
        for token in 0..1000 {
            cache.put(key(token, Want::Mean), &[0.0; 64]);
        }
        assert!(cache.bytes() <= 10_000 && cache.bytes() > 0);
    }

    #[test]
    fn without_a_size_it_keeps_nothing() {
        let cache = AnswerCache::new(0);
        cache.put(key(1, Want::Mean), &[1.0]);
        assert!(cache.get(&key(1, Want::Mean)).is_none());
        assert!(!cache.is_on());
    }
}
