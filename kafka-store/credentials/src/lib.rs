//! Changes the password of a running librdkafka client. rdkafka wraps no such function, and without
//! this crate a changed password would require a restart.

use std::ffi::CString;

use rdkafka::client::{Client, ClientContext};
use rdkafka_sys::bindings::{rd_kafka_error_destroy, rd_kafka_sasl_set_credentials};

/// Sets user and password for the client's next connection and the next re-authentication. Returns
/// `true` if the client accepted both, and `false` if user or password contains a NUL byte or
/// librdkafka reports an error.
pub fn set<C: ClientContext>(client: &Client<C>, user: &str, password: &str) -> bool {
    let (Ok(user), Ok(password)) = (CString::new(user), CString::new(password)) else {
        return false;
    };
    // SAFETY: the client is borrowed and so alive. Both strings end with NUL, and the call copies
    // both. The function takes its own lock and may be called from any thread.
    let error = unsafe {
        rd_kafka_sasl_set_credentials(client.native_ptr(), user.as_ptr(), password.as_ptr())
    };
    if error.is_null() {
        return true;
    }
    // SAFETY: the call returned this non-null error, and no other code holds the pointer.
    unsafe { rd_kafka_error_destroy(error) };
    false
}
