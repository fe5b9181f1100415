// Package hold keeps models in device memory for other processes of the same host. Linux only.
//
// A [Holder] loads models and serves a Unix socket. Other processes map a model with [Attach], in milliseconds and
// without a copy, also while it is still being loaded. What Attach returns is used like a model that this process has
// loaded:
//
//	model, err := hold.Attach(ctx, hold.AttachOptions{}) // the usual socket, the only model
//	if err != nil {
//		return err
//	}
//	defer model.Close() // unmaps it
//	q, err := model.Tensor("blk.0.attn_q.weight")
//	case <-model.Gone(): // somewhere: the holder has ended, so the model's pointers must not be used any more
//
// A Holder has one or several devices, one [loader.Loader] for all its loads, and spreads models over its devices as
// plan.Spec says. A process that attaches must see the same devices; their numbers may differ. With [Options.Ranks] it
// has the parts of several ranks, and who attaches gets that of [AttachOptions.Rank].
//
// Models are in three tiers: device memory, page-locked host memory, and their files. One that nobody uses sleeps when
// another needs its device memory, and comes back when it is attached to; see [Options], [Holder.Sleep] and
// [Holder.Wake]. With [ShareFD] device memory outlives the Holder: attached processes go on when it is killed, and the
// next one takes over what a [Keeper] has kept, with [Holder.Adopt].
//
// [Client] lists, adds and drops models of a Holder in another process. [Holder.WriteMetrics] is for Prometheus.
// README.md says how to run a holder as a service, and what can be relied on when one side is killed.
//
// The two sides do not trust each other more than they must. A Holder bounds what a client sends and how long it may
// take, and no client can hold up another. A client checks all that a Holder says, but uses the memory that the Holder
// names: attach to holders that you trust.
package hold
