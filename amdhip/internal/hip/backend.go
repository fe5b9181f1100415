package hip

// Backend is a filled table, and what else package amdhip must know of who filled it.
type Backend struct {
	// API is the table. All functions that a library must have are set.
	API *API
	// Kind is "hip" for a library and "soft" for the software device.
	Kind string
	// Library is the path or name under which the library was opened; "" for the software device.
	Library string
	// Compiler finds hipRTC when it is first needed; nil: there is none.
	Compiler func() (*Compiler, error)
	// Close ends the backend; nil: nothing is to be done. It is called once.
	Close func() error
	// Owner is what Runtime.Backend returns; nil for a library.
	Owner any
}

// Compiler is hipRTC where it was found.
type Compiler struct {
	RTC  *RTC
	Path string // or name of its library
}
