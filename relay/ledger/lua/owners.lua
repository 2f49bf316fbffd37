-- ARGV: destination, 'own' (pending copies) or 'failure' (failed ones), ids. Returns the job that owns each, '' for none.
local states = 'smtpdup:' .. ARGV[2] .. ':' .. ARGV[1]
local result = {}
for i = 3, #ARGV do
  local state = redis.call('HGET', states, ARGV[i])
  result[#result + 1] = state and string.sub(state, 1, (string.find(state, '\n', 1, true) or 1) - 1) or ''
end
return result
