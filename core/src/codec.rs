//! JSON payloads and upcasters.

/// How payloads of older versions become payloads of the current one.
#[derive(Debug, Default)]
pub struct Upcasters;

impl Upcasters {
    /// No event has had another shape.
    pub fn none() -> Self {
        Self
    }
}
